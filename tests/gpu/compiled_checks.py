"""What `check.py` says of compiled code: functions, the head and runs, beside plain ones.

On a GPU this is Triton's code, which no other test sees, and the head's fp32 sum of products in
half precision.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from roll_sft.engine.fused import run_compiled
from roll_sft.engine.loss import cross_entropy_of_rows
from tests import compiled as functions
from tests import parity

ROWS, HIDDEN, WORDS, REAL_WORDS = 1_500, 256, 50_048, 50_001


def check_compiled(device: str, folder: Path) -> Iterator[tuple[str, float, float]]:
    """Name, error and bound of each; functions in fp32 and bf16 at an odd length."""
    where = torch.device(torch.cuda.current_device())
    for name, dtype in itertools.product(functions.FUNCTIONS, functions.BOUNDS):
        function, plain = functions.FUNCTIONS[name]
        rows, rest = functions.arguments(name, 1_021, dtype)
        rows = [each.to(where) for each in rows]
        rest = [each.to(where) if isinstance(each, torch.Tensor) else each for each in rest]
        found = functions.outcome(
            lambda rows, *rest, f=function: run_compiled(f, rows, *rest), rows, rest
        )
        wanted = functions.outcome(lambda rows, *rest, f=plain: f(*rows, *rest), rows, rest)
        for part, ours, theirs, bound in zip(
            ("", "gradient of ", "second gradient of "),
            found,
            wanted,
            (*functions.BOUNDS[dtype], functions.BOUNDS[dtype][1]),
            strict=False,
        ):
            error = functions.distance(ours, theirs)
            yield f"{part}compiled {name}, {str(dtype)[6:]}", error, bound
    for dtype, is_compiled in itertools.product(functions.BOUNDS, (False, True)):
        yield from _head(where, dtype, is_compiled=is_compiled)
    runs = {}
    for is_compiled in (True, False):
        config = parity.parity_config(
            folder,
            model={"compile": is_compiled},
            parallel={"device": device},
            train={"recompute": "full"},
        )
        runs[is_compiled] = parity.engine_run(config, None) or []
    for key, bound in (("loss", 1e-5), ("grad_norm", 1e-4)):
        pairs = zip(runs[True], runs[False], strict=True)
        worst = max(abs(a[key] / b[key] - 1) for a, b in pairs)
        yield f"fp32 {key} compiled against plain", worst, bound


def _head(
    where: torch.device, dtype: torch.dtype, *, is_compiled: bool
) -> Iterator[tuple[str, float, float]]:
    """Losses and gradients of the head in chunks against whole logits in fp32."""
    torch.manual_seed(3)
    hidden = (torch.randn(ROWS, HIDDEN, device=where) / 4).to(dtype).requires_grad_()
    weight = (torch.randn(WORDS, HIDDEN, device=where) / 4).to(dtype).requires_grad_()
    labels = torch.randint(0, REAL_WORDS, (ROWS,), device=where)
    losses = cross_entropy_of_rows(
        hidden, weight, labels, vocab_size=REAL_WORDS, is_compiled=is_compiled
    )
    losses.sum().backward()
    exact = [each.detach().float().requires_grad_() for each in (hidden, weight)]
    logits = exact[0] @ exact[1][:REAL_WORDS].t()
    wanted = F.cross_entropy(logits, labels, reduction="none")
    wanted.sum().backward()
    kind = f"{'compiled' if is_compiled else 'plain'} head, {str(dtype)[6:]}"
    bound, bound_of_gradients = functions.BOUNDS[dtype]
    yield kind, functions.distance(losses.detach(), wanted.detach()), bound
    for name, ours, theirs in zip(
        ("hidden states", "weight"), (hidden.grad, weight.grad), exact, strict=True
    ):
        assert ours is not None, "the head was trained"
        assert theirs.grad is not None, "and so was the exact one"
        error = functions.distance(ours, theirs.grad)
        yield f"gradient of {name}, {kind}", error, bound_of_gradients
