"""Gradients of every architecture on two tensor-parallel or context-parallel ranks: those of one.

Layouts of a plain model, pipelines and experts on several ranks are in test_layouts.py.
"""

from pathlib import Path

import torch
from architecture_worker import ARCHITECTURES, LAYOUTS, gradients

WORKER = Path(__file__).with_name("architecture_worker.py")


def test_two_ranks_have_the_gradients_of_one(runtime, torchrun, tmp_path):
    alone = {name: gradients(name, {}, tmp_path / name) for name in ARCHITECTURES}
    torchrun(2, WORKER, tmp_path)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert len(found) == sum(map(len, LAYOUTS.values())) + len(ARCHITECTURES)
        for (name, layout), values in found.items():
            assert any("norm" in key for key in values)
            assert set(values) <= set(alone[name])
            for key, value in values.items():
                expected = alone[name][key]
                difference = (value - expected).abs().max() / expected.abs().max()
                assert difference < 1e-5, (name, layout, key)
