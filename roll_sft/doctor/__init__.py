"""Whether this machine, or a cluster, and a configuration are fit for a run."""
