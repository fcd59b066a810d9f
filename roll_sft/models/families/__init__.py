"""The model families, each loaded by its name."""
