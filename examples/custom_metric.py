"""Metrics of your own: how many answers are the right number, and how far off the others are.

    python examples/custom_metric.py MODEL [TRAIN.jsonl] [HELD_OUT.jsonl]

MODEL is a folder or a hub id. The files hold rows such as
{"instruction": "What is 2 plus 3?", "output": "It is 5."}; without them sums are made up. The
answer of a held-out row is its reference. A metric is a number, or a list with one for each prompt,
which `generations.jsonl` keeps beside the answer. A metric that fails costs a warning, never the
run.
"""

import re
import sys
from collections.abc import Sequence

import roll_sft

SUMS = [(f"What is {a} plus {b}?", f"It is {a + b}.") for a in range(20) for b in range(20)]


def number_in(text: str | None) -> float | None:
    """The first number of `text`."""
    found = re.search(r"-?\d+", text or "")
    return float(found[0]) if found else None


def right_numbers(
    samples: Sequence[str],
    prompts: Sequence[object],
    outputs: Sequence[str],
    references: Sequence[str | None],
) -> dict[str, float | list[float | None]]:
    """`right` and `distance` of each answer, and `no_number`, the share of those without one."""
    given, wanted = list(map(number_in, outputs)), list(map(number_in, references))
    pairs = list(zip(given, wanted, strict=True))
    known = [None if None in pair else abs(pair[0] - pair[1]) for pair in pairs]  # type: ignore[operator]
    return {
        "right": [float(each == 0) for each in known],
        "distance": known,
        "no_number": sum(each is None for each in given) / len(given),
    }


if len(sys.argv) < 2:
    sys.exit(__doc__)
train = sys.argv[2] if len(sys.argv) > 2 else SUMS[::2]
held_out = sys.argv[3] if len(sys.argv) > 3 else SUMS[1::25]
result = roll_sft.train(
    samples=train,
    eval_prompts=held_out,
    metric_fn=right_numbers,
    config={
        "model": {"path": sys.argv[1]},
        "data": {"sequence_length": 128},
        "train": {"max_steps": 20, "eval_steps": 10, "global_batch_size": 16},
        "evaluation": {"max_new_tokens": 16},
        "tracking": {"backends": ["jsonl"]},
    },
)
for name in ("right", "distance", "no_number"):
    print(name, [each for each in result.history[f"eval/generation/{name}"] if each is not None])
