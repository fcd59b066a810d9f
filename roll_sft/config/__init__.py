"""The configuration of a run: its keys, how it is built, and its checks."""
