"""The teacher's layers measured once, for all students of a run."""
