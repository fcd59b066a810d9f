"""Makes docs/performance.md of what was kept; the text around the tables is written there.

python benchmarks/shared/page.py

`make bench` keeps benchmarks/results/MACHINE.jsonl. What `make bench-gpu ARGS="--out FOLDER"`
leaves in FOLDER/measures.jsonl is to be kept as benchmarks/results/gpu/DEVICE.jsonl.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
GPU = "GPU"
# Of each measure its number, what it is, and the names of its lines or why it has none.
MEASURES: tuple[tuple[int, str, tuple[str, ...] | str], ...] = (
    (1, "preparation, tokens per CPU second, over TRL's", ("prepare_over_trl",)),
    (2, "preparation over the tokenizer's encoder alone", ("prepare_over_encoder",)),
    (3, "first step, cold, over preparing everything", "see below"),
    (
        4,
        "warm start, 1M rows, seconds; over that with 1k rows",
        ("warm_start_seconds", "warm_start_growth"),
    ),
    (5, "packs over the fewest there can be", ("packing_rows",)),
    (6, "tokens of an epoch's steps over those of its samples", ("tokens_kept",)),
    (7, "plans of a whole epoch of 1M lengths, CPU seconds", ("epoch_plan_seconds",)),
    (8, "costliest data rank over the mean", ("dp_imbalance",)),
    (9, "costliest pack of a rank over the mean", ("pack_imbalance",)),
    (10, "packs above the cap in 1,000 random batches", ("cap_violations",)),
    (11, "our step over a bare Megatron-Core loop", ("trainer_overhead",)),
    (12, "driver and Ray per step over an empty round trip", ("driver_overhead",)),
    (13, "a worker's wait at 64 times the tokens", ("worker_idle_at_64_times_the_tokens",)),
    (14, "driver and Ray at 16 workers, which share two cores", ("driver_at_16_workers",)),
    (15, "GPU idle between steps", GPU),
    (16, "step time at 1M rows over 1k", ("step_time_growth",)),
    (17, "driver's own memory, bytes a row", ("driver_bytes_a_row",)),
    (18, "head's peak memory over fp32 logits", ("masked_head_memory",)),
    (19, "head's time at 40 % masked over all rows", ("masked_head_time",)),
    (20, "loss under any layout, packing and split", "`make parity`"),
    (21, "save over write + fsync of the same bytes", ("checkpoint_save",)),
    (22, "stall of an asynchronous save over a blocking one", ("checkpoint_stall",)),
    (23, "resume, same layout: bitwise", "`make test`"),
    (
        24,
        "import over a file copy; export over one; import: memory over its bound; export: the same",
        ("import_over_copy", "export_over_copy", "import_memory", "export_memory"),
    ),
    (
        25,
        "training on a CPU over TRL; over bare transformers",
        ("train_over_trl", "train_over_bare_transformers"),
    ),
    (26, "GPU: MFU, causal and document-aware", GPU),
    (27, "GPU: packed real data over unpadded mock data", GPU),
    (28, "GPU: our step over a bare torch step", GPU),
)
EXTRA = (
    "startup_seconds",
    "report_seconds",
    "report_megabytes",
    "checkpoint_verify",
    "checkpoint_load",
    "save_memory_blocking",
    "save_memory_asynchronous",
    "epoch_plan_bytes",
    "tracker_overhead",
    "generation",
    "lora_step_over_full",
    "lora_over_peft",
    "merge_over_copy",
    "qwen3_moe_over_transformers",
    "qwen3_moe_over_megatron",
)


def main() -> int:
    """Rewrites the parts of the page between its marks."""
    text = PAGE.read_text(encoding="utf-8")
    for path in sorted(RESULTS.glob("*.jsonl")):
        known = {line["name"]: line for line in _lines(path)}
        parts = {
            "measures": _measures(known),
            "workers": _growth(known, "ranks"),
            "rows": _growth(known, "rows"),
            "machine": [f"Machine: `{path.stem}`."],
        }
        for name, rows in parts.items():
            text = _between(text, f"<!-- {name} -->\n", f"<!-- end of {name} -->", rows)
    text = _between(text, "<!-- gpu -->\n", "<!-- end of gpu -->", _gpu())
    PAGE.write_text(text, encoding="utf-8")
    return 0


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _gpu_lines() -> list[dict[str, Any]]:
    return [line for path in sorted((RESULTS / "gpu").glob("*.jsonl")) for line in _lines(path)]


def _gpu() -> list[str]:
    lines = _gpu_lines()
    if not lines:
        return ["Unmeasured so far: no figure of a GPU is in this page."]
    columns = ("measure", "shape", "tokens a pack", "figure", "goal", "holds", "tokens/s", "device")
    rows = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for line in lines:
        speed = line["packed_tokens_per_s"] if line["name"] == "mfu" else ""
        cells = (
            *(line["name"], line.get("shape", ""), line.get("pack_tokens", "")),
            *(f"{line['ratio']:.4g}", line["goal"] or ""),
            *({True: "yes", False: "**no**", None: ""}[line["holds"]], speed, line["device"]),
        )
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return rows


def _between(text: str, begin: str, end: str, rows: list[str]) -> str:
    before, _, rest = text.partition(begin)
    return before + begin + "".join(f"{row}\n" for row in rows) + end + rest.partition(end)[2]


def _measures(known: dict[str, dict[str, Any]]) -> list[str]:
    rows = [
        "| # | measure | figure | spread | goal | holds | command |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, title, names in MEASURES:
        if isinstance(names, str):
            if names == GPU:
                names = "see below" if _gpu_lines() else "not measured: needs a GPU"
            rows.append(f"| {number} | {title} | | | | | {names} |")
            continue
        titles = title.split("; ") if len(names) > 1 else [title]
        rows += [
            _row(str(number), each, known.get(name))
            for each, name in zip(titles, names, strict=True)
        ]
    return rows + [_row("", name.replace("_", " "), known.get(name)) for name in EXTRA]


def _row(number: str, title: str, line: dict[str, Any] | None) -> str:
    if line is None:
        return f"| {number} | {title} | not taken | | | | |"
    holds = "yes" if line["holds"] else "**no**"
    spread = f"{line['low']:.4g}-{line['high']:.4g} ({line['pairs']})"
    return (
        f"| {number} | {title} | {line['ratio']:.4g} | {spread} | {line['goal']} | {holds} |"
        f" `{line['command'].removeprefix('python benchmarks/')}` |"
    )


def _growth(known: dict[str, dict[str, Any]], by: str) -> list[str]:
    lines = [line for line in known.values() if line["name"].startswith("growth_") and by in line]
    lines.sort(key=lambda line: line[by])
    if not lines:
        return ["not taken"]
    keys = [key for key in lines[0] if key not in ("name", "quick")]
    head = "| " + " | ".join(key.replace("_", " ") for key in keys) + " |"
    rows = ["| " + " | ".join(f"{line[key]:,}" for key in keys) + " |" for line in lines]
    return [head, "|" + "---|" * len(keys), *rows]


if __name__ == "__main__":
    sys.exit(main())
