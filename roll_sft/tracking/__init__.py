"""Trackers: where a run's metrics go besides its own files. MLflow is imported here alone."""
