"""Tests of the built kernel."""
