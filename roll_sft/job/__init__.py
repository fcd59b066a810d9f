"""Everything that is decided before a worker exists."""
