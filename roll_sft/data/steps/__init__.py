"""Samples to steps: epochs, packing, plans, batches, learning rate."""
