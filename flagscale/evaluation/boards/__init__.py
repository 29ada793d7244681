"""Many students side by side: of a sweep, of many runs."""
