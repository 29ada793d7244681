"""Lets Megatron-Core's distributed optimiser resume with torch's Adam, which a CPU has.

transformer-engine's Adam keeps its step with the parameter groups, torch's with each parameter.
Megatron-Core 0.16.1 reads the latter's step before there is one, and then looks for it among the
tensors of the checkpoint, where it is not; and it lets all parameters share one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def begin(optimizer: MegatronOptimizer) -> None:
    """Make the state that Megatron-Core expects to read into, of step 0, where there is none."""
    for adam in _inside(optimizer):
        for group in adam.param_groups:
            for parameter in group["params"]:
                if not adam.state[parameter]:
                    adam.state[parameter] = {
                        "exp_avg": torch.zeros_like(parameter.data),
                        "exp_avg_sq": torch.zeros_like(parameter.data),
                        "step": torch.zeros((), device=parameter.device),
                    }


@contextmanager
def step_apart(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Load a state dict inside: the step is taken out before the tensors are loaded, and put back.

    Each parameter then has a step of its own: one that all share is counted up by each.
    """
    steps: dict[torch.Tensor, torch.Tensor] = {}

    def take_out(adam: torch.optim.Optimizer) -> None:
        for parameter, state in adam.state.items():
            steps[parameter] = state.pop("step")

    with ExitStack() as stack:
        adams = list(_inside(optimizer))
        for adam in adams:
            stack.callback(adam.register_load_state_dict_post_hook(take_out).remove)
        yield
    for adam in adams:
        for parameter, state in adam.state.items():
            state["step"] = steps[parameter].clone()


def _inside(optimizer: MegatronOptimizer) -> Iterator[torch.optim.Optimizer]:
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(one, DistributedOptimizer) and isinstance(
            one.optimizer, torch.optim.Adam | torch.optim.AdamW
        ):
            yield one.optimizer
