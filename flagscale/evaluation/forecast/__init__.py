"""How a loss will go on, from how it went so far."""
