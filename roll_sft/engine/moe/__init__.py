"""Experts and their router on one rank."""
