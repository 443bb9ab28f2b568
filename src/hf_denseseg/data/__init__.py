"""Label specifications, dataset loaders and augmentation."""
