"""The step that ends a rung of a search."""
