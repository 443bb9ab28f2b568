"""Exports of annotation tools, read as they are."""
