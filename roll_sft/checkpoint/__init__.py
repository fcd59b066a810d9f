"""Checkpoint folders: written by each rank, published, found again, deleted."""
