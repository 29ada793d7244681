"""The step that exports the best student of a sweep."""
