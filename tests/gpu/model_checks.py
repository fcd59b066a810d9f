"""What `check.py` says of families, experts and recipes: runs on a GPU beside the same on a CPU.

The suite holds those of a CPU against transformers and peft. Each trains, evaluates and answers
prompts on one engine; in half precision only the losses are compared.
"""

import itertools
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from roll_sft.base.generation import GenerationRequest
from roll_sft.base.layout import ParallelLayout
from roll_sft.base.metrics import EvalMetrics
from roll_sft.config.schema import RunConfig
from roll_sft.engine.engine import Engine
from roll_sft.engine.generation.generate import generate
from roll_sft.job.in_process import prepare_job
from tests import parity
from tests.families import FAMILIES
from tests.pool import RankPool

STEPS, PROMPTS, NEW_TOKENS = 4, 6, 12
LOSS_BOUND, NORM_BOUND, HALF_BOUND = 1e-5, 1e-4, 3e-2
TERMS = {
    "loss": "sample_mean",
    "label_smoothing": 0.1,
    "z_loss_coef": 1e-3,
    "neftune_noise_alpha": 5.0,
    "learning_rate_factors": {"embeddings": 0.25, "layers.[12].mlp": 3.0},
    "num_layers_unfrozen": 3,
}
ADAPTERS = {"rank": 4, "alpha": 8, "dropout": 0.2, "modules_to_save": ["lm_head"]}
Case = tuple[str, Mapping[str, Any]]  # a kind of model, and sections of the configuration
CASES: dict[str, Case] = {
    **{kind: (kind, {}) for kind in ("olmo2", *FAMILIES, *parity.EXPERTS)},
    "terms": ("qwen2", {"train": TERMS}),
    "recompute full": ("gemma2", {"train": {"recompute": "full"}}),
    "recompute parts": ("mixtral", {"train": {"recompute": ["core_attn", "mlp", "layernorm"]}}),
    "adapters": ("qwen2", {"lora": ADAPTERS}),
    "adapters in experts": ("qwen3moe", {"lora": {"rank": 4, "alpha": 8}}),
}
Outcome = tuple[list[dict[str, float]], EvalMetrics, list[tuple[int, ...]]]


def check_models(device: str, folder: Path) -> Iterator[tuple[str, float, float]]:
    """Name, error and bound of each case, in fp32 and bf16.

    `folder` holds what `check.write_inputs` writes. The runs of the CPU go beside those of the GPU.
    """
    for kind in sorted({kind for kind, _ in CASES.values()}):
        parity.home_of(folder, kind)
    with ThreadPoolExecutor(max_workers=6) as threads:
        wanted = {
            name: threads.submit(_on_cpu, _config(folder, case, device="cpu"))
            for name, case in CASES.items()
        }
        for name, case in CASES.items():
            try:
                yield from _compared(name, _config(folder, case, device=device), wanted[name])
                half = {"dtype": "bf16", "compile": device == "cuda"}
                steps = parity.engine_run(_config(folder, case, device=device, model=half), None)
                error = parity.worst(steps or [], wanted[name].result()[0], "loss")
                yield f"bf16 loss of {name}", error, HALF_BOUND
            except Exception as error:  # noqa: BLE001 -- the other cases say more
                print(f"     {name}: {type(error).__name__}: {error}", flush=True)
                yield f"an error of {name}", 1, 0


def _config(
    root: Path, case: Case, *, device: str, model: dict[str, Any] | None = None
) -> RunConfig:
    kind, given = case
    home = root / kind
    sections = {name: dict(values) for name, values in given.items()}
    sections["train"] = {"max_steps": STEPS, "adam_eps": 1e-6, **sections.get("train", {})}
    sections["model"] = model or {"compile": False}
    held_out = {"path": str(home / "rows.jsonl"), "name": "held_out"}
    return parity.parity_config(
        home, parallel={"device": device}, data={"validation": [held_out]}, **sections
    )


def _on_cpu(config: RunConfig) -> Outcome:
    """What a process of its own finds, which has a CPU for a device."""
    pool = RankPool()
    try:
        found: Outcome = pool.run(outcome_of, ParallelLayout(1), config)[0]
        return found
    finally:
        pool.close()


def outcome_of(config: RunConfig) -> Outcome:
    """Loss and gradient norm of each step, then an evaluation and answers to prompts."""
    job = prepare_job(config)
    engine = Engine(config, source=job.source, data=job.data)
    steps = []
    for step in range(1, job.total_steps + 1):
        work = job.planner.step(step).work_for(0, learning_rate=job.schedule.at(step))
        found = engine.train_step(work)
        assert found is not None, "one rank reports"
        steps.append(
            {"loss": found.loss_sum / found.supervised_tokens, "grad_norm": found.grad_norm}
        )
    chunks = [
        engine.evaluate("held_out", plan.ranks[0])
        for plan in job.validation["held_out"].evaluation()
    ]
    draw = np.random.default_rng(3)
    prompts = [draw.integers(0, 400, size=3 + 9 * index).tolist() for index in range(PROMPTS)]
    asked = GenerationRequest(tuple(map(tuple, prompts)), (5, 17), NEW_TOKENS)
    answers = sorted(generate(engine, asked) or (), key=lambda each: each.index)
    whole = sum((each for each in chunks if each is not None), EvalMetrics(0.0, 0))
    return steps, whole, [each.ids for each in answers]


def _compared(
    name: str, config: RunConfig, wanted: "Future[Outcome]"
) -> Iterator[tuple[str, float, float]]:
    ours, theirs = outcome_of(config), wanted.result()
    yield f"loss of {name}", parity.worst(ours[0], theirs[0], "loss"), LOSS_BOUND
    yield f"grad_norm of {name}", parity.worst(ours[0], theirs[0], "grad_norm"), NORM_BOUND
    evaluation = abs(ours[1].loss_sum / theirs[1].loss_sum - 1)
    yield f"evaluation of {name}", evaluation, LOSS_BOUND
    differing = sum(a != b for a, b in itertools.zip_longest(ours[2], theirs[2]))
    yield f"other answers of {name}", differing, 0
