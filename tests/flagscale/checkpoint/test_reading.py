"""Who reads what of a checkpoint: of ranks that need the same, one does, and hands it on."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_shape import SHAPE
from reading_worker import EXPERTS, LAYOUTS, kind

from flagscale.checkpoint import load_weights, save_weights
from flagscale.megatron import platform
from flagscale.megatron.shape import ModelShape
from flagscale.models.megatron import build_model

WORKER = Path(__file__).with_name("reading_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, torchrun):
    """What every rank of every layout read of weights that one process saved."""
    folder = tmp_path_factory.mktemp("reading")
    with platform.runtime():
        for experts in (False, True):
            save_weights(build_model(shape_of(experts), 16), folder / kind(experts))
            shape_of(experts).save(folder / kind(experts))
    for processes in (2, 4):
        torchrun(processes, WORKER, folder)
    return folder


def shape_of(experts: bool) -> ModelShape:
    return replace(SHAPE, architecture=EXPERTS) if experts else SHAPE


def ranks(folder: Path, layout: str) -> list[dict]:
    paths = sorted(folder.glob(f"{LAYOUTS[layout][0]}-*.json"))
    return [json.loads(path.read_text())[layout] for path in paths]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_piece_is_read_once_a_data_parallel_group(folder, layout):
    found = ranks(folder, layout)
    assert len(found) == LAYOUTS[layout][0]
    for group in {tuple(one["group"]) for one in found}:
        pieces = Counter(tuple(piece) for rank in group for piece in found[rank]["pieces"])
        assert pieces
        assert set(pieces.values()) == {1}
        shares = [len(found[rank]["pieces"]) for rank in group]
        assert min(shares) > 0, "a rank that only waits"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_have_what_was_saved(folder, layout):
    experts = LAYOUTS[layout][2]
    with platform.runtime():
        ours, theirs = (build_model(shape_of(experts), 16) for _ in range(2))
        load_weights(ours, folder / layout)
        load_weights(theirs, folder / kind(experts))
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other), name
