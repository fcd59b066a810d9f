"""`roll-sft parity`: a batch beside transformers."""
