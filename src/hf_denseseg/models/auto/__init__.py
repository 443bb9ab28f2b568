"""Registration of the families with the Auto classes, loading of checkpoints, tasks, and code for the hub."""
