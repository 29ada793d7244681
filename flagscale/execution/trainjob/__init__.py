"""Ranks in pods of their own, as a TrainJob of Kubeflow Trainer."""
