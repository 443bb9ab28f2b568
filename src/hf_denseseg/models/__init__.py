"""One folder per paper, `auto/` that finds and opens them, and what they share that holds no weights."""
