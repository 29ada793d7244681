"""The steps as Kubeflow components: an import, one call, the outputs."""
