"""Experts: their shape, configuration and weights."""
