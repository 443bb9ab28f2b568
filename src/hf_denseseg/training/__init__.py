"""From recipe to trained checkpoint: arguments, trainer, run, tasks."""
