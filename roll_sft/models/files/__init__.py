"""The folder of a model: its files read, checked and written."""
