"""Every fault of a dataset before it is trained on, per task."""
