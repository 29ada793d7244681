"""Pages of one artifact, and what all pages are made of."""
