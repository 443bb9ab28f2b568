"""Figures of label maps, objects, attention, features and scores; each takes arrays and gives an image."""
