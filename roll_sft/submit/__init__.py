"""Runs as jobs of a Ray cluster: `roll-sft submit`."""
