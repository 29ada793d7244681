"""Teacher, student before and student after, compared."""
