"""Fewer and larger operations: compiled functions, gradients added by products, rows of a chunk.

What is element-wise between two matrix products is several kernels when torch runs it op by op, and
each reads and writes the whole activation: SwiGLU, the rotation of queries and keys, the softmax of
the head, and RMSNorm where torch has no kernel of its own. Each of these is one pure function
beside the code that uses it. torch.compile makes one kernel of it and one of its derivative, whose
intermediates are fp32 whatever the dtype of the tensors.
"""

import functools
import importlib.util
import logging
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import torch

from roll_sft.base.errors import ConfigError, first_line

LOG = logging.getLogger(__name__)
# Compiled graphs of one function in one process: one for each inner shape, with and without
# gradients. torch's own limit of 8 is too low for a process that builds several models in turn.
MAX_GRAPHS = 64


def choose_compile(wanted: bool | None, *, device: torch.device) -> bool:
    """Whether to compile: `model.compile`; None means on a GPU only.

    Compiles a small function first. Where that fails, raises `ConfigError` if `wanted` is True, and
    else logs the reason and returns False.
    """
    if wanted is False or (wanted is None and device.type != "cuda"):
        return False
    reason = _why_not(device)
    if reason is None:
        return True
    if wanted:
        raise ConfigError(
            f"model.compile: true, and torch.compile does not work here ({reason}); install what it"
            " lacks, or set model.compile=false"
        )
    LOG.warning("model.compile: off, as torch.compile does not work here (%s); slower", reason)
    return False


def _why_not(device: torch.device) -> str | None:
    """One line on what keeps torch.compile from working on `device`, or None if it does."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    numbers = torch.ones(2, 4, device=device, requires_grad=True)
    try:
        run_compiled(_sample, [numbers]).sum().backward()
    except (ConfigError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        return first_line(error.__cause__ or error)
    return None


def _sample(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.sigmoid() * numbers


def run_compiled(
    function: Callable[..., Any], rows: Sequence[torch.Tensor], *constants: Any
) -> Any:
    """`function(*rows, *constants)`, compiled.

    The first dimension of each of `rows` may differ between calls; the same code serves all
    lengths. Other dimensions, and `constants` with their shapes, are compiled in, since a kernel
    that knows its width is faster. Raises `ConfigError` if the function does not compile.
    """
    compiled = _compiled(function)
    for tensor in rows:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    try:
        return compiled(*rows, *constants)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise ConfigError(
            f"model.compile: {function.__name__} of {[*rows[0].shape]} {rows[0].dtype} does not"
            f" compile here ({first_line(error)}); set model.compile=false"
        ) from error


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch._dynamo
    import torch._inductor.config

    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, MAX_GRAPHS)
    options: dict[str, Any] = {}
    if hasattr(torch._inductor.config, "deterministic"):  # torch 2.10
        # Else timings choose the layout of a sum, and with it the last bits of a run.
        options["deterministic"] = True
    return torch.compile(function, dynamic=False, fullgraph=True, options=options or None)


def add_in_products(config: Any, *, device: torch.device) -> None:
    """Make the linear layers of Megatron's `config` add their gradients to the fp32 buffer at once.

    Megatron does so with a kernel of Apex. Without Apex it forms the gradient of a micro-batch in
    the weight's dtype and adds it in a second pass: twice the memory traffic, and in bf16 one more
    rounding. torch's product can add to fp32. On a CPU the second pass costs next to nothing.
    """
    from megatron.core.tensor_parallel import layers

    if device.type == "cuda" and (layers._grad_accum_fusion_available or adds_to_fp32(device)):
        use_added_products(config)


def use_added_products(config: Any) -> None:
    """Turn on Megatron's switch; its linear layers call torch's product where there is no Apex.

    The one thing on a GPU that is set in a module of Megatron's. It replaces nothing: the name is
    bound only where Apex is installed. No field or argument selects another product, and a subclass
    of the linear layers would repeat their whole backward with its overlapped collectives.
    """
    from megatron.core.tensor_parallel import layers

    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = _InPlaceOfApex
        layers._grad_accum_fusion_available = True
    config.gradient_accumulation_fusion = True


class _InPlaceOfApex:
    """The function of Apex's module that Megatron calls for fp32 buffers."""

    @staticmethod
    def wgrad_gemm_accum_fp32(
        inputs: torch.Tensor, grad_outputs: torch.Tensor, main_grad: torch.Tensor
    ) -> None:
        """Add the weight's gradient to `main_grad` fp32 [O, I].

        `inputs` is [T, I]; `grad_outputs` [T, O] is the gradient of the product.
        """
        add_product(main_grad, grad_outputs.t(), inputs)


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add `left` @ `right` to the fp32 `total`, without a rounding between where torch can."""
    if right.dtype == torch.float32:
        total.addmm_(left, right)
    elif right.is_cuda and adds_to_fp32(right.device):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.add_(left @ right)


@functools.cache
def adds_to_fp32(device: torch.device) -> bool:
    """Whether half precision times half precision can be added to fp32 at once (torch 2.8).

    Tried on a few numbers, since it depends on the device and its libraries.
    """
    left, right = (torch.ones(16, 16, device=device, dtype=torch.bfloat16) for _ in range(2))
    total = torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool((total == 17.0).all())
