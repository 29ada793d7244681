"""Components of the category evaluation."""
