"""One module per `denseseg` command."""
