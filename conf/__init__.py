"""The shipped configuration, packaged so that an installed copy finds it."""
