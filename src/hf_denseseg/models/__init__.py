"""One folder per paper, `auto/` to find and load them, and shared code that holds no weights."""
