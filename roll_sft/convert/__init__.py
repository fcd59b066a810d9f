"""Checkpoints to HuggingFace folders, and back."""
