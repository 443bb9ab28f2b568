"""Pages and cards written from plain results; nothing here knows how they were made."""
