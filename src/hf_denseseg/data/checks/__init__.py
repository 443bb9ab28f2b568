"""Checks that find every fault of a dataset before training, per task."""
