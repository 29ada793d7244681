"""FlagScale distillation: the steps that distil a large language model, and what they share."""
