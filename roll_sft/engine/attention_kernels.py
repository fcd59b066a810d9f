"""The kernels of packed attention, and the choice between them.

Legend as in `engine/attention.py`. Each kernel takes query [T, H, E], key and value [K, G, E] and
the segments, and returns [T, H, E] in the query's dtype. They are interchangeable: causal with the
triangle at the bottom right, grouped heads, no dropout, scale 1 / sqrt(E).

`sdpa` runs everywhere and is the reference of the others. They need CUDA and half precision.
`varlen` is written against the operators of torch 2.10 to 2.13; those of other packages are in
`engine/attention_packages.py`.
"""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F

from roll_sft.base.errors import ConfigError, first_line
from roll_sft.engine.micro_batch import Segments

if TYPE_CHECKING:
    from roll_sft.models.variation import Variation

LOG = logging.getLogger(__name__)
INSTALL = {
    "te": "Transformer Engine; install roll_sft[cuda]",
    "fa3": "torch 2.11 or newer and flash-attention 3, built from the folder hopper of its sources",
    "flash": "flash-attn; install roll_sft[cuda]",
    "varlen": "torch 2.10 or newer",
}
# Raised by a package that does not fit the machine: at import (another CUDA, another torch, a
# folder of the same name), or at the first call (an old card, a head size without a kernel).
NOT_FIT = (
    ImportError,
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
)
TRIAL_TOLERANCE = 0.05  # of the largest value; bf16 keeps 8 bits


class Kernel(Protocol):
    """Attention over segments."""

    __name__: str

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, /
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention heads of one tensor rank, and how they attend if not as a plain decoder's."""

    num_heads: int
    num_groups: int  # of keys and values
    head_dim: int
    variation: "Variation | None" = None


def choose_kernel(
    backend: str, *, device: torch.device, dtype: torch.dtype, heads: Heads
) -> Kernel:
    """The kernel of `model.attention_backend`; `auto` takes the fastest that works.

    Each candidate computes a small pack with `heads`, forward and backward, and is compared with
    `sdpa`: a failing import or an old card shows here, not in the first step. Raises `ConfigError`
    for a backend that was asked for by name and does not work.
    """
    use_own_kernels()
    if backend == "sdpa" or (
        backend == "auto" and (device.type != "cuda" or dtype == torch.float32)
    ):
        return sdpa
    from roll_sft.engine.attention_packages import PACKAGES

    kernels: dict[str, Kernel] = {**PACKAGES, "varlen": varlen, "sdpa": sdpa}
    reasons: list[str] = []
    for name in kernels if backend == "auto" else [backend]:
        reason = why_not(kernels[name], device, dtype, heads)
        if reason is None:
            passed_over = "".join(f"; not {each}" for each in reasons)
            LOG.info("model.attention_backend: %s%s", name, passed_over)
            return kernels[name]
        reasons.append(f"{name} ({reason})")
    raise ConfigError(
        f"model.attention_backend: {backend!r} does not work here: {reason}; it needs"
        f" {INSTALL[backend]}, or choose auto"
    )


def why_not(kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: Heads) -> str | None:
    """One line on why `kernel` cannot be used for `heads`, or None if it can."""
    use_own_kernels()
    try:
        # The reference first: a kernel may put itself under torch's operators.
        wanted, found = (_trial(each, device, dtype, heads) for each in (sdpa, kernel))
    except NOT_FIT as error:
        return f"{type(error).__name__}: {first_line(error)}"
    for ours, right in zip(found, wanted, strict=True):
        difference = float((ours - right).abs().max() / right.abs().max())
        if not difference <= TRIAL_TOLERANCE:  # a NaN is no match
            return f"its output or gradient differs from torch's by {difference:.2g}"
    return None


def use_own_kernels() -> None:
    """Let torch's operators run torch's kernels, if an earlier trial or engine has changed that."""
    found = torch.nn.attention
    if hasattr(found, "current_flash_attention_impl") and found.current_flash_attention_impl():
        found.restore_flash_attention_impl()


def _trial(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: Heads
) -> list[torch.Tensor]:
    """Output [64, H, E] and the gradients of query, key and value, all fp32."""
    if heads.variation is not None:
        from roll_sft.engine.variations.varied_kernels import strictest

        kernel = strictest(kernel, heads.variation)
    # A whole sample, and the second chunk of a longer one, as context parallelism makes them.
    query_bounds, key_bounds = (
        torch.tensor(bounds, dtype=torch.int32, device=device)
        for bounds in ([0, 24, 64], [0, 24, 128])
    )
    segments = Segments((24, 40), (24, 104), query_bounds, key_bounds)
    generator = torch.Generator().manual_seed(0)
    shapes = (64, heads.num_heads), (128, heads.num_groups), (128, heads.num_groups)
    query, key, value = (
        torch.randn(*shape, heads.head_dim, generator=generator).to(device, dtype).requires_grad_()
        for shape in shapes
    )
    output = kernel(query, key, value, segments)
    output.float().square().sum().backward()
    results = (output.detach(), query.grad, key.grad, value.grad)
    return [tensor.float() for tensor in results if tensor is not None]


def sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """torch's scaled dot product, one segment at a time."""
    lengths = list(segments.query_lengths), list(segments.key_lengths)
    parts = zip(
        query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True
    )
    return torch.cat([_causal(*part) for part in parts])


def varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """torch's own flash attention, which `torch.nn.attention.varlen` wraps.

    The wrapper is a custom operator, whose Python costs the host more than the kernel costs the
    GPU where the model is small.
    """
    output: torch.Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, *segments.bounds(), 0.0, True, return_debug_mask=False
    )[0]
    return output


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of the last `len(query)` positions of `key`: [t, H, E] over [k, G, E]."""
    num_queries, num_keys = query.shape[0], key.shape[0]
    mask = None
    if num_queries < num_keys:
        # is_causal aligns the triangle to the top left; a later chunk needs the bottom right.
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(num_keys - num_queries)
    output = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=True,
    )
    return output[0].transpose(0, 1)
