"""What models write, and how fast."""
