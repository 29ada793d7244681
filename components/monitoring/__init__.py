"""Components of the category monitoring."""
