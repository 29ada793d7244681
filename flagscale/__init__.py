"""FlagScale distillation: the steps that distil a large language model, and what they share."""

from flagscale.imports import compile_when_called

compile_when_called()  # before anything imports Megatron-Core
