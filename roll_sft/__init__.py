"""Supervised fine-tuning of large language models on Ray and Megatron-Core."""
