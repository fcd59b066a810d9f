"""Adapters: their names, their folder, and a quantized base."""
