"""What the libraries of a rank read from the environment when they start.

Set by both doors, a Ray worker and torchrun, before the first CUDA call, so that one configuration
runs alike behind them. A value that the user set stays.
"""

import os
from importlib.metadata import version

from packaging.version import Version

OLD_ALLOCATOR_VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"  # before torch 2.9, which warns of it


def set_variables(*, deterministic: bool) -> None:
    """Set what this process's rank needs, where it is not set."""
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
