"""The demonstration: its text, its model, its answer."""
