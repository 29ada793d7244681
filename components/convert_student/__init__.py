"""Teacher to student, conversion proven."""
