"""One rank of training on Megatron-Core, free of Ray."""
