"""Embedded street scenes and objects, rendered from a seed."""
