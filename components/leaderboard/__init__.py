"""The step that ranks the variants of a sweep."""
