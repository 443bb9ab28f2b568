"""Embedded street scenes and objects, drawn from a seed."""
