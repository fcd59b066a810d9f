"""The environment variables and the warning filters that a rank needs before it imports torch.

Both doors, a Ray worker and torchrun, call these before the first CUDA call, so that a
configuration runs alike behind them. A variable that the user has set stays.
"""

import os
import warnings
from importlib.metadata import version

from packaging.version import Version

LOOPBACK = "127.0.0.1"
OLD_ALLOCATOR_VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"  # before torch 2.9, which warns of it

# Warnings that a user cannot act on: (beginning of the message, module that warns).
WARNINGS = (
    # Both are optional; the log names the kernels that are used.
    ("Transformer Engine and Apex are not installed", r"megatron\."),
    ("Apex is not installed", r"megatron\."),
    # Optional too, since 0.19: another way to write a log.
    (r"absl\.logging is not installed", r"megatron\."),
    # Parts of Megatron-Core that we do not use, and that importing it brings along.
    (r"\w+ is experimental and still under active development", r"megatron\."),
    # Megatron-Core's default of a setting that we do not use.
    ("full scope is deprecated", r"megatron\.core\.transformer\.transformer_config"),
    # Calls of Megatron-Core's, which follows torch in its own time.
    (r"`torch\.distributed\.\w+` is deprecated", r"torch\.distributed\."),
    # Megatron-Core's optimizer asks each of its shards for a gradient before it clears it. The
    # module is the one that calls, which is ours where a CPU stands for a GPU.
    (r"The \.grad attribute of a Tensor that is not a leaf", r"(megatron|roll_sft\.engine)\."),
)


def silence_warnings() -> None:
    """Ignore `WARNINGS`; call this before the first import of Megatron-Core."""
    for message, module in WARNINGS:
        warnings.filterwarnings("ignore", message, module=module)


def set_variables(*, deterministic: bool) -> None:
    """Set the variables that this process's rank needs, where they are not set."""
    # Megatron's tensor parallelism relies on one hardware queue to order its kernels.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Packs differ in size from step to step, which leaves holes in segments of fixed size.
    if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", OLD_ALLOCATOR_VARIABLE}:
        is_old = Version(version("torch")) < Version("2.9")
        name = OLD_ALLOCATOR_VARIABLE if is_old else "PYTORCH_ALLOC_CONF"
        os.environ[name] = "expandable_segments:True"
    if deterministic:
        # cuBLAS needs a fixed workspace to repeat itself.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def listen_at(ip: str) -> None:
    """Have gloo listen on the interface of `ip`; on loopback NCCL's rendezvous too.

    NCCL chooses among the networks between nodes by itself. A variable that the user has set stays.
    """
    import psutil  # without Ray it may not be installed

    addresses = psutil.net_if_addrs().items()
    names = [name for name, each in addresses if ip in (address.address for address in each)]
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])
        if ip == LOOPBACK:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", names[0])
