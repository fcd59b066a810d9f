"""What the Python API is made of; `roll_sft/api.py` has its functions."""
