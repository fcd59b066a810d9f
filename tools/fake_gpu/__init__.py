"""The check of the CUDA path that needs no GPU: `make fake-gpu`."""
