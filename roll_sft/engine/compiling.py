"""Which runs train on compiled code (`model.compile`), and how a small pure function is compiled.

What is elementwise between two matrix products is several kernels when torch runs it op by op, each
of which reads and writes the whole activation: SwiGLU, the rotation of queries and keys, the
softmax of the head, and RMSNorm where torch has no kernel of its own for it. Each is one pure
function beside the code that uses it; torch.compile makes one kernel of it, and one of its
derivative. Intermediates of a kernel are fp32 whatever the dtype of the tensors.
"""

import functools
import importlib.util
import logging
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from roll_sft.base.errors import ConfigError

LOG = logging.getLogger(__name__)
# Of one function in one process: each inner shape, with and without gradients. torch's own 8 is
# enough for one model and not for a process that builds several in turn.
MAX_GRAPHS = 64


def choose(wanted: bool | None, *, device: torch.device) -> bool:
    """Whether to compile: `model.compile`, or if that is None, where there is a GPU.

    Tries it on a few numbers. Where that fails, raises `ConfigError` if it was asked for, and else
    logs why and answers no.
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


def turn_on(config: TransformerConfig, *, on: bool) -> None:
    """Make the layers that are built with `config` compile, or not."""
    # Megatron's own switch for a fused activation: its MLP asks it, and so does our code.
    config.bias_activation_fusion = on


def is_on(config: TransformerConfig) -> bool:
    """Whether what is built with `config` is to compile."""
    return bool(config.bias_activation_fusion)


def run(function: Callable[..., Any], rows: Sequence[torch.Tensor], *rest: Any) -> Any:
    """`function(*rows, *rest)`, compiled.

    The first dimension of each of `rows` may differ between calls, and the same code serves all
    lengths; other dimensions, all of `rest`, and numbers in it are compiled in, since a kernel that
    knows its width is quicker. Raises `ConfigError` if it does not compile.
    """
    compiled = _compiled(function)
    for tensor in rows:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    try:
        return compiled(*rows, *rest)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model.compile: {function.__name__} of {[*rows[0].shape]} {rows[0].dtype} does not"
            f" compile here ({reason}); set model.compile=false"
        ) from error


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch._dynamo
    import torch._inductor.config

    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, MAX_GRAPHS)
    options: dict[str, Any] = {}
    if hasattr(torch._inductor.config, "deterministic"):  # torch 2.10
        # Else the layout of a sum is chosen by a stopwatch, and with it the last bits of a run.
        options["deterministic"] = True
    return torch.compile(function, dynamic=False, fullgraph=True, options=options or None)


def _why_not(device: torch.device) -> str | None:
    """One line on what keeps torch.compile from working on `device`, or None if it does."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    numbers = torch.ones(2, 4, device=device, requires_grad=True)
    try:
        run(_sample, [numbers]).sum().backward()
    except (ConfigError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        return str(error.__cause__ or error).strip().splitlines()[0]
    return None


def _sample(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.sigmoid() * numbers
