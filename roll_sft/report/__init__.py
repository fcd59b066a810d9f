"""The report of a run: one HTML page of its curves, samples, configuration and end."""
