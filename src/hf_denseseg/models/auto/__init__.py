"""Every family by its folder: registration with the Auto classes, loading, tasks, and code for the hub."""
