"""The step that hands on a student of a search."""
