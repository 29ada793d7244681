"""Components of the category data processing."""
