"""The three core functions and the training loop around them."""
