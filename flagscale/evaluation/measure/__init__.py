"""Models run over text: sums a document, single tokens, the importance of layers."""
