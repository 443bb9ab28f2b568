"""Label specifications, dataset loaders, augmentation, dataset checks and synthetic data."""
