"""One folder per paper; `registration` finds them by walking this package."""
