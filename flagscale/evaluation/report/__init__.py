"""The report of one evaluation, verdict first."""
