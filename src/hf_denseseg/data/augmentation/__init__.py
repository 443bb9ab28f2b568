"""Random crops, scales, colors and flips of training, and the tensors of evaluation, per task."""
