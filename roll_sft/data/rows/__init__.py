"""Files to conversations."""
