"""What trainings and rankings of a search's candidates share."""
