"""Faults in tiny runs, and what a run does then: `roll-sft rehearse`."""
