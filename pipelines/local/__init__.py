"""Runs on this machine: steps as processes, or each in its own container."""
