"""Model families: shapes, weight tables, HuggingFace files."""
