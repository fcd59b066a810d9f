"""SwiGLU of the joint projection as one function, which `compiling` makes one kernel.

Megatron-Core's MLP computes it op by op, or calls a function of Megatron's own that is compiled
for the first length and again for the second; that name is what `install` replaces.

Legend: T tokens of this rank, F columns of the MLP on this tensor rank.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer import mlp

from roll_sft.engine import compiling


def install() -> None:
    """Make the MLPs in this process that compile use `swiglu`."""
    setattr(mlp, "bias_swiglu_impl", _of_mlp)  # noqa: B010 -- a name of another module


def swiglu(pairs: torch.Tensor) -> torch.Tensor:
    """[T, 2 F], the gates and then what they gate -> [T, F], same dtype; computed in fp32."""
    # Halves are converted, not the whole: a tensor that is cut in fp32 would be joined in fp32.
    gates, gated = pairs.chunk(2, dim=-1)
    return (F.silu(gates.float()) * gated.float()).to(pairs.dtype)


def _of_mlp(pairs: torch.Tensor, bias: torch.Tensor | None, *_: bool) -> torch.Tensor:
    """As Megatron-Core's `bias_swiglu_impl`: [T, 1, 2 F] -> [T, 1, F]."""
    assert bias is None, "no family has a bias in its MLP"
    # A view, not `pairs[:, 0]`: the backward of an index fills and copies the whole activation.
    activated: torch.Tensor = compiling.run(swiglu, [pairs.flatten(0, 1)])
    return activated.unsqueeze(1)
