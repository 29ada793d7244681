"""A training of six steps, which ends in a moment."""

from flagscale.recipe import TrainingRecipe

RECIPE = TrainingRecipe(
    train_iters=6,
    micro_batch_size=2,
    global_batch_size=4,
    lr=1e-3,
    min_lr=1e-4,
    lr_warmup_iters=2,
    # Adam takes full steps along gradients far above eps. At the rounding level fp32 and float64
    # have different ones, so that level must not be above eps.
    adam_eps=1e-5,
    weight_decay=0.1,
    clip_grad=0.1,
    eval_interval=3,
    eval_iters=2,
    save_interval=2,
    seed=5,
)
