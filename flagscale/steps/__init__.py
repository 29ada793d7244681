"""The steps of the pipeline, each a plain function of recipe sections and paths."""
