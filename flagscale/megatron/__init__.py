"""A Megatron-Core model from arguments, on the devices that there are."""
