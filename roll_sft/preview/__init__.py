"""`roll-sft preview`: what a run would learn from its rows."""
