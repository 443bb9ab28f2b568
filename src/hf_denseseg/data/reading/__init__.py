"""Read files: images and label maps, archives, MATLAB files, run-length encodings."""
