"""Answers that end with a full stop become more frequent, as in trlX's first example.

    python examples/full_stops.py [MODEL]

MODEL is a folder or a hub id. Without one a small model starts from random weights, which needs
neither a download nor a GPU.
"""

import sys
from collections.abc import Sequence

import roll_sft

PAIRS = [(f"What is {a} plus {b}?", f"It is {a + b}.") for a in range(20) for b in range(20)]
QUESTIONS = [f"What is {a} plus {a + 1}?" for a in range(0, 64, 4)]


def ends_with_full_stop(
    samples: Sequence[str], prompts: Sequence[object], outputs: Sequence[str], references: object
) -> dict[str, list[float]]:
    """1 for each answer that ends with a full stop, 0 for each other."""
    return {"full_stop": [float(text.rstrip().endswith(".")) for text in outputs]}


model = {"path": "outputs/demo_assets/model", "random_init": True}
if len(sys.argv) > 1:
    model = {"path": sys.argv[1], "random_init": False}
config = roll_sft.load_config("base").evolve(
    model=model,
    data={"sequence_length": 128},
    train={"max_steps": 32, "eval_steps": 4, "global_batch_size": 16, "learning_rate": 1e-3},
    evaluation={"max_new_tokens": 16},
    checkpoint={"save": False, "hf_export": "none"},
    tracking={"backends": ["jsonl"]},
)
result = roll_sft.train(
    samples=PAIRS, eval_prompts=QUESTIONS, metric_fn=ends_with_full_stop, config=config
)
history = result.history
for step, share in zip(history["step"], history["eval/generation/full_stop"], strict=True):
    if share is not None:
        print(f"step {step:3}: {share:4.0%} of the answers end with a full stop")
