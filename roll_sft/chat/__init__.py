"""Answers of a model: `roll-sft chat` and `roll-sft generate`, with transformers on an export."""
