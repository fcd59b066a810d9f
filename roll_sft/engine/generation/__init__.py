"""Answers of the model that trains, on one rank."""
