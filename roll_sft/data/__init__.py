"""Rows to token ids to step plans to packed batches."""
