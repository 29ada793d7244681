"""lm-eval's tasks: asked of models, their scores, and how these are compared."""
