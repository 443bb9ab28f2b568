"""Training augmentation (crop, scale, color, flip) and evaluation samples, per task."""
