"""Models as files of other runtimes: written, verified against the model, and run through the same inference."""
