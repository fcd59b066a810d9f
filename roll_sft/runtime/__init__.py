"""The Ray side: placement, actors, the worker group."""
