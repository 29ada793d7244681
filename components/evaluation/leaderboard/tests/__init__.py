"""Of the component."""
