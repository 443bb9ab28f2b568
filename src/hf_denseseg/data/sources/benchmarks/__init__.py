"""The published segmentation benchmarks, read from the files as they are distributed."""
