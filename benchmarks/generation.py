"""Answers during training, in tokens per CPU second, beside transformers' `generate`.

    python benchmarks/generation.py

The engine and transformers hold the weights of one Qwen2 of 5M parameters in fp32, on one thread,
and answer the same batch: 16 prompts of 8 to 200 tokens, 64 tokens each, greedily. transformers
pads the prompts on the left and keeps keys and values as it does by default; `generation_uncached`
has it compute them again for each token. Both sides' tokens are compared. The sides are
interleaved, and `ratio` is the median of the pairs' ratios.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu_throughput import engine_of, write_model
from shared import measures
from transformers import AutoModelForCausalLM

from roll_sft.base.generation import GenerationRequest

PROMPTS, NEW_TOKENS, LONGEST = 16, measures.size(64, quick=16), 200
PACKAGES = ("torch", "megatron-core", "transformers")


def main() -> None:
    """Measures and prints one JSON line for each denominator."""
    torch.set_num_threads(1)
    draw = np.random.default_rng(0)
    lengths = [8, LONGEST, *draw.integers(8, LONGEST, size=PROMPTS - 2).tolist()]
    prompts = tuple(tuple(draw.integers(10, 8000, size=length).tolist()) for length in lengths)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder)
        with engine_of(folder, "model.random_init=false") as (engine, _):
            model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
            ours = _ours(engine, prompts)
            _measure(
                "generation",
                ours,
                _theirs(model.eval(), prompts, caches=True),
                pairs=measures.pairs(7),
                goal=">= 1.0",
                denominator="transformers' generate with its cache",
            )
            _measure(
                "generation_uncached",
                ours,
                _theirs(model, prompts, caches=False),
                pairs=1,
                goal=">= 5",
                denominator="transformers' generate without a cache",
            )


def _measure(
    name: str,
    ours: Callable[[], list[list[int]]],
    theirs: Callable[[], list[list[int]]],
    *,
    pairs: int,
    goal: str,
    denominator: str,
) -> None:
    assert ours() == theirs(), "the answers differ"
    ratios, seconds = [], 0.0
    for pair in range(pairs):
        # Each is first in turn, so that what warms up or drifts meets both.
        first, second = (ours, theirs) if pair % 2 else (theirs, ours)
        taken = {first: _cpu_seconds(first), second: _cpu_seconds(second)}
        ratios.append(taken[theirs] / taken[ours])
        seconds = taken[ours]
    measures.show(
        name,
        ratios,
        goal=goal,
        denominator=denominator,
        packages=PACKAGES,
        tokens_per_cpu_s=round(PROMPTS * NEW_TOKENS / seconds),
    )


def _ours(engine: Any, prompts: tuple[tuple[int, ...], ...]) -> Callable[[], list[list[int]]]:
    from roll_sft.engine.generation.generate import generate

    request = GenerationRequest(prompts, (), NEW_TOKENS)

    def answer() -> list[list[int]]:
        answers = sorted(generate(engine, request) or [], key=lambda each: each.index)
        return [list(each.ids) for each in answers]

    return answer


def _theirs(
    model: Any, prompts: tuple[tuple[int, ...], ...], *, caches: bool
) -> Callable[[], list[list[int]]]:
    ids = torch.zeros(len(prompts), LONGEST, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, LONGEST - len(prompt) :] = torch.tensor(prompt)
        mask[row, LONGEST - len(prompt) :] = 1

    def answer() -> list[list[int]]:
        with torch._C.DisableTorchFunction():  # the mode of our `cpu_backend` would slow it
            output = model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                use_cache=caches,
                eos_token_id=None,
                pad_token_id=0,
            )
        answers: list[list[int]] = output[:, LONGEST:].tolist()
        return answers

    return answer


def _cpu_seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


if __name__ == "__main__":
    main()
