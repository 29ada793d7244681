"""Documents to tokens, to indexed datasets, to batches."""
