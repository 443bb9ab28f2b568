"""Pages, tables and model cards, written from plain results without knowing how these were computed."""
