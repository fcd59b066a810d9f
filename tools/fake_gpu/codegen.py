"""The machine code that torch.compile makes of the engine's functions for a GPU of compute 9.0.

Inductor writes Triton, and ptxas, which comes with it, makes machine code: neither needs a GPU.
What does not compile shows here. Rows are dynamic, as in `run_compiled`. Nothing runs.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import triton
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from triton.backends.compiler import GPUTarget

from roll_sft.base.errors import ConfigError, first_line
from roll_sft.engine import fused
from roll_sft.engine.attention import rotated_in_fp32
from roll_sft.engine.layers import normed_rows, scaled_rows, square_sums, swiglu
from roll_sft.engine.loss import exponential_sums, logit_gradient
from tools.fake_gpu import device

ROWS, HIDDEN, FFN, WORDS, REAL_WORDS = 8191, 1536, 8960, 151_936, 151_665


@dataclass(frozen=True, slots=True)
class Code:
    """What became of one function."""

    function: str
    kernels: int  # of the forward and the backward
    num_bytes: int  # of machine code
    fault: str | None


class Target:
    """What Triton asks of a driver: the machine to write for."""

    def get_current_target(self) -> GPUTarget:
        """An H100."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, _: int = 0) -> int:
        """The only one."""
        return 0

    def get_device_interface(self) -> Any:
        """torch's."""
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        """The only one."""
        return torch.device("cuda", 0)

    def is_active(self) -> bool:
        """Always."""
        return True


def generated() -> Iterator[Code]:
    """The code of each function, one after another; makes the process a fake one for good."""
    sizes: dict[Any, int] = {}  # by kernel, of which one of several configurations counts

    def launchers(tuner: Any) -> None:
        sizes[tuner] = min(map(_code_bytes, tuner.compile_results), default=0)
        tuner.launchers = [lambda *_, **__: None]

    autotuner: Any = CachingAutotuner
    autotuner._make_launchers, autotuner.run = launchers, lambda *_, **__: None
    triton.runtime.driver.set_active(Target())
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    torch._inductor.config.compile_threads = 1
    engine: Any = fused
    engine._compiled = _compiled
    with device.fake_mode(), torch.autograd.set_multithreading_enabled(False):
        for function, rows, constants in _calls():
            sizes.clear()
            try:
                results = fused.run_compiled(function, rows, *constants)
                results = results if isinstance(results, tuple) else (results,)
                if all(each.requires_grad for each in results):
                    torch.autograd.backward(results, [torch.empty_like(each) for each in results])
                fault = None if sizes and min(sizes.values()) else "no machine code"
            except (ConfigError, RuntimeError) as error:
                fault = first_line(error.__cause__ or error)
            yield Code(function.__name__, len(sizes), sum(sizes.values()), fault)


def _code_bytes(result: Any) -> int:
    """The size of a kernel's machine code, which torch may hold in a file."""
    kernel = result.kernel
    raw = getattr(kernel, "cubin_raw", None) or getattr(kernel, "asm", {}).get("cubin")
    return len(raw) if raw else Path(kernel.cubin_path).stat().st_size


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `engine.fused` compiles, with graphs that run op by op beside the code made of them."""

    def compile_graph(graph: Any, inputs: Any) -> Any:
        with torch._inductor.config.patch(deterministic=True, force_disable_caches=True):
            compile_fx_inner(graph, inputs)

        def run(arguments: Any) -> Any:
            return graph.forward(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    backend = aot_autograd(
        fw_compiler=compile_graph,
        bw_compiler=compile_graph,
        decompositions=select_decomp_table(),
    )
    return torch.compile(function, dynamic=False, fullgraph=True, backend=backend)


def _calls() -> Iterator[tuple[Callable[..., Any], list[torch.Tensor], tuple[Any, ...]]]:
    """Each function with arguments of the 1.5B model, in bf16."""

    def half(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def single(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, device="cuda", dtype=dtype)

    yield swiglu, [half(ROWS, 2 * FFN)], ()
    yield rotated_in_fp32, [half(ROWS, 12, 128), half(ROWS, 2, 128), single(ROWS, 1, 128)], ()
    yield normed_rows, [half(ROWS, HIDDEN)], (half(HIDDEN), 1e-6)
    yield square_sums, [half(ROWS, HIDDEN)], ()
    squares = single(ROWS, 1).requires_grad_()
    yield scaled_rows, [half(ROWS, HIDDEN), squares], (half(HIDDEN), HIDDEN, 1e-6)
    with torch.no_grad():
        logits = half(512, WORDS).detach()
        yield exponential_sums, [logits], (REAL_WORDS,)
        of_row = [single(512, 1), single(512, 1), single(512, 1, dtype=torch.int64)]
        yield logit_gradient, [logits, *of_row], (REAL_WORDS,)
