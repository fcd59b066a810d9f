"""What only makes rendering and encoding quicker."""
