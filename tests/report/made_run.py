"""Folders of runs as a run leaves them, made up: of any length, finished, failed or with little."""

import json
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HOSTILE = "</script><script>alert('x')</script>\"<img src=x onerror=y>{{ 7*7 }}\x1b]0;t\x07"


def write_lines(path: Path, lines: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def step_line(step: int, chance: random.Random, *, total: int, experts: int = 0) -> dict[str, Any]:
    tokens = 60_000 + chance.randrange(4_000)
    line = {
        "step": step,
        "epoch": step / total,
        "train_loss": 0.9 + 1.4 * math.exp(-6 * step / total) + 0.08 * chance.gauss(0, 1),
        "grad_norm": 0.6 + 3 * math.exp(-20 * step / total) + 0.1 * chance.random(),
        "learning_rate": 1e-5
        * min(1, step / (0.03 * total))
        * 0.5
        * (1 + math.cos(3.1 * step / total)),
        "supervised_tokens": tokens // 3,
        "total_tokens": tokens,
        "total_tokens_including_padding": round(tokens * (1 + 0.01 * chance.random())),
        "pack_fill": 0.93 + 0.05 * chance.random(),
        "per_device_tps": 9_000 + 400 * chance.gauss(0, 1),
        "per_device_tps_including_padding": 9_100.0,
        "step_time_s": 1.6 + 0.1 * chance.random(),
        "data_wait_s": 0.004 * chance.random(),
        "mfu": 0.42 + 0.01 * chance.gauss(0, 1),
        "peak_memory_gib": 61 + chance.random(),
        "dp_imbalance": 1 + 0.02 * chance.random(),
        "sample_ids_sha256": "0" * 64,
    }
    if experts:
        load = [chance.randrange(900, 1_100) for _ in range(experts)]
        line |= {"expert_max_over_mean": 1.2 + 0.2 * chance.random(), "tokens_per_expert": load}
    return line


def eval_line(step: int, name: str, loss: float) -> dict[str, Any]:
    parts = {
        part: {"loss": loss + more, "perplexity": math.exp(loss + more), "token_accuracy": 0.6}
        for part, more in (
            ("turn 1", 0.1),
            ("turn 2", -0.05),
            ("turn 3", -0.1),
            ("tool calls", -0.4),
        )
    }
    for each in parts.values():
        each["supervised_tokens"] = 900
    return {
        "step": step,
        "name": name,
        "loss": loss,
        "perplexity": math.exp(loss),
        "supervised_tokens": 4_000,
        "time_s": 2.0,
        "token_accuracy": 0.61,
        "best_loss": loss,
        "best_step": step,
        "parts": parts,
    }


def make_run(
    folder: Path,
    *,
    num_steps: int = 300,
    seed: int = 1,
    end: tuple[int, str | None] | None = (0, None),
    experts: int = 0,
    learning_rate: float = 1e-5,
) -> Path:
    """A run with every file that a report reads.

    `end` is its exit code and cause; None: it has not ended.
    """
    chance = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(
        folder / "steps.jsonl",
        (step_line(n, chance, total=num_steps, experts=experts) for n in range(1, num_steps + 1)),
    )
    evals = range(max(1, num_steps // 10), num_steps + 1, max(1, num_steps // 10))
    write_lines(
        folder / "eval.jsonl",
        (
            eval_line(step, name, 1.0 + gap + 1.2 * math.exp(-5 * step / num_steps))
            for step in evals
            for name, gap in (("held_out", 0.1), ("tools", 0.3))
        ),
    )
    with (folder / "eval.jsonl").open("a") as file:
        for step in evals:
            means = {"token_f1": 0.2 + step / num_steps / 2}
            file.write(json.dumps({"step": step, "name": "generation", "metrics": means}) + "\n")
    write_lines(
        folder / "restarts.jsonl", [{"step": num_steps // 2, "from_step": num_steps // 2 - 1}]
    )
    slow = {"rank": 3, "host": "node-2", "device": "NVIDIA H100", "times_as_long": 1.8}
    write_lines(folder / "stragglers.jsonl", [{"step": num_steps // 2, **slow}])
    write_lines(
        folder / "generations.jsonl",
        (
            {
                "step": step,
                "index": index,
                "prompt": f"Question {index}: what is a decorator in Python?",
                "output": f"At step {step} the model says that a decorator is a callable. " * 4,
                "reference": "A function that takes a function and returns a function.",
                "metrics": {"token_f1": 0.2 + step / num_steps / 2, "length": 40},
            }
            for step in evals
            for index in range(3)
        ),
    )
    ranks = [
        [[chance.randrange(80, 900) for _ in range(chance.randrange(5, 8))] for _ in range(6)]
        for _ in range(2)
    ]
    edges = [50.0 * each for each in range(41)]
    counts = [round(4_000 * math.exp(-(((each - 12) / 8) ** 2))) for each in range(40)]
    (folder / "job").mkdir(exist_ok=True)
    (folder / "job" / "packs.json").write_text(
        json.dumps(
            {
                "step": 1,
                "capacity": 4_096,
                "ranks": ranks,
                "num_samples": sum(counts),
                "edges": edges,
                "tokens": counts,
                "supervised": [*counts[12:], *[0] * 12],
            }
        )
    )
    (folder / "config.yaml").write_text(
        f"run_name: {folder.name}\nseed: {seed}\nmodel:\n  path: Qwen/Qwen2.5-7B\n"
        f"train:\n  learning_rate: {learning_rate}\n  global_batch_size: 64\n"
    )
    dropped = {"overlong": 12, "malformed": 1}
    counted = {"rows": 20_000, "kept": 19_987, "samples": 19_987, "tokens": 9_100_000}
    source = {"name": "chats", **counted, "dropped": dropped, "supervised_share": 0.34}
    (folder / "data_report.json").write_text(json.dumps({"sources": [source]}))
    begun = {"host": "node-1", "pid": 4711, "device": "cuda", "python": "3.11.9"}
    versions = {"roll_sft": "0.1.0", "torch": "2.8.0", "megatron-core": "0.16.1"}
    starts = [
        {"event": "start", "step": 1, **begun, "versions": versions, "time": 1.79e9},
        {"event": "end", "exit_code": 143, "cause": "ended by signal 15", "time": 1.79e9 + 900},
        {
            "event": "start",
            "step": num_steps // 3 + 1,
            **begun,
            "versions": versions,
            "time": 1.79e9 + 1_000,
        },
    ]
    if end is not None:
        ended = {"exit_code": end[0], "cause": end[1], "time": 1.79e9 + 3_000}
        starts.append({"event": "end", **ended})
    write_lines(folder / "starts.jsonl", starts)
    return folder


def make_failed_run(folder: Path, *, num_steps: int = 120) -> Path:
    """A run that diverged after `num_steps`."""
    cause = (
        f"step {num_steps + 1}: train_loss nan and grad_norm nan must be finite; the samples of"
        " this step are in bad_batches.jsonl; the last good checkpoint is step_00000100: lower"
        " train.learning_rate or train.max_grad_norm and go back to it with"
        " resume=outputs/diverged/checkpoints/step_00000100"
    )
    make_run(folder, num_steps=num_steps, seed=5, end=(5, cause), learning_rate=3e-3)
    bad = {"step": num_steps + 1, "train_loss": None, "grad_norm": None}
    write_lines(folder / "bad_batches.jsonl", [{**bad, "samples": ["chats:17", "chats:4021"]}])
    return folder
