import pytest

from flagscale.recipe import DistillationRecipe
from flagscale.recipe.served import check_served

HIDDEN = {"name": "hidden", "dtype": "fp32", "hidden_size": 64}
SAMPLED = {"name": "sampled", "temperature": 2.0, "draws": 50, "seed": 0}
TOP_K = {"name": "topk", "temperature": 2.0, "top_k": 9}
TOP_K_KL = {"divergence": "top_k_kl", "temperature": 2.0}


@pytest.mark.parametrize(
    ("loss", "codec"),
    [
        *(
            ({"divergence": name}, HIDDEN)
            for name in DistillationRecipe.model_fields["divergence"].annotation.__args__
        ),
        ({"temperature": 3.0}, HIDDEN),
        ({"temperature": 2.0}, SAMPLED),
        ({**TOP_K_KL, "top_k": 9}, TOP_K),
        ({**TOP_K_KL, "top_k": 1}, TOP_K),
    ],
)
def test_served(loss, codec):
    check_served(DistillationRecipe(**loss), codec)


LAYERS = (("decoder.layers.0", "decoder.layers.1"),)


@pytest.mark.parametrize(
    ("loss", "codec", "names"),
    [
        ({"divergence": "reverse_kl", "temperature": 2.0}, SAMPLED, "reverse_kl: .* forward_kl"),
        ({**TOP_K_KL, "top_k": 9}, SAMPLED, "top_k_kl: .* serve forward_kl alone"),
        ({"temperature": 2.0}, TOP_K, "forward_kl: .* serve top_k_kl alone"),
        ({"temperature": 1.0}, SAMPLED, r"temperature=1.0: .* of temperature 2.0"),
        ({**TOP_K_KL, "top_k": 10}, TOP_K, "top_k=10: .* have 9 tokens"),
        ({"intermediate_layer_pairs": LAYERS}, HIDDEN, "intermediate_layer_pairs=.*=live"),
        ({"attention_layer_pairs": ((0, 1),)}, HIDDEN, "attention_layer_pairs=.*=live"),
    ],
)
def test_refused(loss, codec, names):
    with pytest.raises(ValueError, match=names):
        check_served(DistillationRecipe(**loss), codec)
