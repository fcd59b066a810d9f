"""Weights for `model.random_init`, from a seeded generator."""

import hashlib
from collections.abc import Mapping

import torch

from roll_sft.models.files.safetensors_in import Shape

SEEDED = "random weights of seed "  # and the seed: what such a source is called


class RandomSource:
    """Fresh float32 weights for `model.random_init`: norms 1, biases 0, the rest normal.

    Each tensor has a generator of its own, seeded by `seed` and the tensor's name, so the weights
    do not depend on the layout, on which slices are read, or on their order.
    """

    def __init__(self, shapes: Mapping[str, Shape], *, seed: int, initializer_range: float) -> None:
        self._shapes = dict(shapes)
        self._seed = seed
        self._initializer_range = initializer_range

    def __str__(self) -> str:
        return f"{SEEDED}{self._seed}"

    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> Shape:
        return self._shapes[name]

    def read(self, name: str) -> torch.Tensor:
        tensor = torch.empty(self._shapes[name], dtype=torch.float32, device="cpu")
        if name.endswith("norm.weight"):
            return tensor.fill_(1.0)
        if name.endswith(".bias"):
            return tensor.zero_()
        assert tensor.ndim > 1, f"no rule to initialize {name} of shape {self._shapes[name]}"
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        return tensor.normal_(0.0, self._initializer_range, generator=generator)

    def read_slice(self, name: str, *, start: int, stop: int, dim: int) -> torch.Tensor:
        """Entries `start` to `stop` along `dim`, in memory of their own."""
        entries = self.read(name).narrow(dim, start, stop - start)
        return entries.clone(memory_format=torch.contiguous_format)
