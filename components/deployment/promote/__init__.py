"""The student that shows what its recipe asks is promoted."""
