"""Candidates of a search: their ranking, their board and its page."""
