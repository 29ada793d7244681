"""One rank that reads checkpoints on several layouts: `torchrun ... reading_worker.py FOLDER`.

Each rank leaves in FOLDER/<processes>-<rank>.json, by layout: its data-parallel group and what it
read of files. All together save again, in FOLDER/<layout>, what they have read.
"""

import json
import os
import sys
from pathlib import Path

import torch
from megatron.core import parallel_state
from torch.distributed.checkpoint import FileSystemReader

from flagscale.checkpoint import load_weights, save_weights
from flagscale.megatron import platform
from flagscale.megatron.arguments import training_arguments
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import ArchitectureRecipe, TrainingRecipe
from flagscale.train.setup import build_model_chunks

TENSOR, EXPERT = {"tensor_model_parallel_size": 2}, {"expert_model_parallel_size": 2}
PIPELINE = {"pipeline_model_parallel_size": 2}
EXPERTS = ArchitectureRecipe(num_experts=4, moe_ffn_hidden_size=64)
# name -> processes, parallelism, experts
LAYOUTS = {
    "DP2": (2, {}, False),
    "TP2": (2, TENSOR, False),
    "TP2 x DP2": (4, TENSOR, False),
    "PP2 x DP2": (4, PIPELINE, False),
    "EP2, experts": (2, EXPERT, True),
    "EP2 x DP2, experts": (4, EXPERT, True),
}


def read(parallelism, shape: ModelShape, weights: Path, to: Path) -> dict:
    recipe = TrainingRecipe(train_iters=1, lr=1e-3, global_batch_size=4, parallelism=parallelism)
    args = training_arguments(shape, 16, recipe)
    with platform.runtime(0, recipe.parallelism), use_args(args):
        chunks = build_model_chunks(args)
        for parameter in chunks[0].parameters():
            parameter.data.fill_(torch.nan)
        pieces, read_data = [], FileSystemReader.read_data

        def counting(reader, plan, planner):
            stored = (reader.storage_data[item.storage_index] for item in plan.items)
            pieces.extend([one.relative_path, one.offset] for one in stored)
            return read_data(reader, plan, planner)

        FileSystemReader.read_data = counting
        try:
            load_weights(chunks, weights)
        finally:
            FileSystemReader.read_data = read_data
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        save_weights(chunks, to)
        return {"group": torch.distributed.get_process_group_ranks(group), "pieces": pieces}


def main() -> None:
    folder, processes = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    found = {}
    for name, (count, parallelism, experts) in LAYOUTS.items():
        if count == processes:
            weights = folder / kind(experts)
            found[name] = read(parallelism, ModelShape.load(weights), weights, folder / name)
    name = f"{processes}-{os.environ['RANK']}.json"
    (folder / name).write_text(json.dumps(found))


def kind(experts: bool) -> str:
    return "experts" if experts else "dense"


if __name__ == "__main__":
    main()
