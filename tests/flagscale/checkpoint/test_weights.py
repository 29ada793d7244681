import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from flagscale.checkpoint import load_weights, save_weights
from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.models.megatron import build_model
from tests.flagscale.checkpoint.checkpoint_shape import SHAPE

ON_A_FULL_DISK = """
import sys
from pathlib import Path
from flagscale.megatron import platform
from flagscale.checkpoint import save_weights
from flagscale.errors import UserError
from flagscale.models.megatron import build_model
from flagscale.megatron.shape import ModelShape

if __name__ == "__main__":
    shape = ModelShape.load(Path(sys.argv[1]))
    with platform.runtime():
        model = build_model(shape, 16)
        try:
            save_weights(model, Path(sys.argv[2]) / "weights")
        except UserError as error:
            print("ERROR:", error)
"""


@pytest.fixture
def model():
    with platform.runtime():
        yield build_model(SHAPE, 16)


def test_round_trip(model, tmp_path):
    save_weights(model, tmp_path / "weights")
    other = build_model(SHAPE, 16)
    other.decoder.layers[0].mlp.linear_fc1.weight.data.zero_()
    load_weights(other, tmp_path / "weights")
    for (name, ours), theirs in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_no_process_is_left_behind(model, tmp_path):
    import psutil

    before = {child.pid for child in psutil.Process().children(recursive=True)}
    save_weights(model, tmp_path / "weights")
    after = {child.pid for child in psutil.Process().children(recursive=True)}
    assert after == before


def test_unfinished_checkpoint_is_refused(model, tmp_path):
    save_weights(model, tmp_path / "weights")
    (tmp_path / "weights" / "metadata.json").unlink()
    with pytest.raises(UserError, match=r"no complete checkpoint.*metadata\.json"):
        load_weights(model, tmp_path / "weights")


def test_checkpoint_of_another_model_is_refused(model, tmp_path):
    save_weights(model, tmp_path / "weights")
    with pytest.raises(UserError, match="cannot be read"):
        load_weights(build_model(replace(SHAPE, num_layers=3), 16), tmp_path / "weights")


def test_damaged_checkpoint_is_refused(model, tmp_path):
    save_weights(model, tmp_path / "weights")
    for path in (tmp_path / "weights").glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read"):
        load_weights(model, tmp_path / "weights")


@pytest.mark.skipif(
    os.getuid() != 0 or not shutil.which("mount"), reason="only root can mount a small disk"
)
def test_full_disk_is_one_clear_error(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = ["-t", "tmpfs", "-o", "size=1m", "tmpfs"]
    if subprocess.run(["mount", *size, str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    replace(SHAPE, hidden_size=512, ffn_hidden_size=1024, kv_channels=128).save(tmp_path)
    (tmp_path / "script.py").write_text(ON_A_FULL_DISK)
    command = [sys.executable, "-W", "ignore", tmp_path / "script.py", tmp_path, disk]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert f"ERROR: no space left on the disk of {disk}" in output


def test_weights_do_not_depend_on_the_layers_implementation(model, tmp_path):
    """transformer-engine's layers have extra states that local ones lack."""
    from torch.distributed.checkpoint import FileSystemReader

    save_weights(model, tmp_path / "weights")
    saved = set(FileSystemReader(tmp_path / "weights").read_metadata().state_dict_metadata)
    assert "decoder.final_layernorm.weight" in saved
    assert not [name for name in saved if "_extra_state" in name]
