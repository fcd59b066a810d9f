"""Other trainers' configurations into ours, every key accounted for."""
