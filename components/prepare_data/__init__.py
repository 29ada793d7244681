"""Text to token datasets."""
