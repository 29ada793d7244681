"""FlagScale distillation: the steps that distil a large language model, and what they share."""

from flagscale.imports import compile_when_called

# Before anything imports Megatron-Core or transformers, whichever module does so first.
compile_when_called()
