"""Supervised fine-tuning of large language models on Ray and Megatron-Core."""

__version__ = "0.1.0"  # pyproject.toml reads it here, and so does a checkout that is not installed
