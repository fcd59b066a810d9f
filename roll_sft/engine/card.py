"""The model card of an export: `README.md` and the curve of the loss, from the run's own files.

A checkpoint away from its run gets no card. Shows names, counts and settings, and no path, address
or secret: of `config.yaml` only the keys listed here are taken, as they were composed.
"""

import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"
CURVE = "loss.png"
_TRAIN_KEYS = (
    "global_batch_size", "num_train_epochs", "max_steps", "learning_rate", "min_learning_rate",
    "lr_scheduler_type", "warmup_ratio", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_eps", "max_grad_norm",
)  # fmt: skip
_DATA_KEYS = ("sequence_length", "packing", "train_on", "shuffle")
_TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [sft, roll_sft, megatron-core]
{%- if hub_id %}
base_model: {{ hub_id }}
{%- endif %}
---

# {{ run_name }}

{{ base }}, fine-tuned with roll_sft on Megatron-Core: step {{ step }} of the run. Written
with {{ versions | join(", ") }}.

## Data

| source | rows | kept | tokens | supervised tokens |
|---|---:|---:|---:|---:|
{%- for row in sources %}
| {{ row | join(" | ") }} |
{%- endfor %}

## Loss

{{ curve }}

First step {{ losses[0] }}, last step {{ losses[-1] }}, in nats per supervised token.
{%- if validation %}

| validation set | step | loss |
|---|---:|---:|
{%- for row in validation %}
| {{ row | join(" | ") }} |
{%- endfor %}
{%- endif %}

## Settings

| key | value |
|---|---|
{%- for key, value in settings.items() %}
| {{ key }} | {{ value }} |
{%- endfor %}
"""


def write_card(checkpoint: Path, folder: Path) -> None:
    """Put README.md and the loss's curve into the model `folder`, if the run is around."""
    run = checkpoint.resolve().parents[1]
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        report = json.loads((run / "data_report.json").read_text(encoding="utf-8"))
        steps = _lines(run / "steps.jsonl", until=manifest["step"])
    except FileNotFoundError:
        return
    if not steps:
        return
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    hub_id, base = _base_model(config)
    counts = ("rows", "kept", "tokens", "supervised_tokens")
    # Names come from files and from people: escaped as HTML, and no `|` ends a cell of a table.
    environment = Environment(undefined=StrictUndefined, autoescape=True)
    text = environment.from_string(_TEMPLATE).render(
        run_name=_cell(config["run_name"]),
        hub_id=hub_id,
        base=base,
        versions=[f"{name} {version}" for name, version in manifest["versions"].items()],
        step=manifest["step"],
        sources=[
            [_cell(source["name"]), *(f"{source[key]:,}" for key in counts)]
            for source in report["sources"]
        ],
        losses=[f"{step['train_loss']:.4f}" for step in steps],
        validation=[
            [_cell(row["name"]), row["step"], f"{row['loss']:.4f}"]
            for row in _last_of_each(_lines(run / "eval.jsonl", until=manifest["step"]))
        ],
        settings=_settings(config, manifest),
        curve=Markup(_curve(steps, folder)),
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def _lines(path: Path, *, until: int) -> list[dict[str, Any]]:
    """The records of a file of a run up to step `until`; none of a file that there is not."""
    if not path.is_file():
        return []
    records = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [record for record in records if record["step"] <= until]


def _last_of_each(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest evaluation of each validation set."""
    return list({record["name"]: record for record in records}.values())


def _base_model(config: Mapping[str, Any]) -> tuple[str | None, str]:
    """The hub's id of what was trained, if its path tells one, and what to call it."""
    path = str(config["model"]["path"])
    in_cache = re.search(r"models--([\w.-]+?)--([\w.-]+)", path)
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path) and not Path(path).exists()
    hub_id = "/".join(in_cache.groups()) if in_cache else path if is_id else None
    name = _cell(hub_id or Path(path).name)
    return hub_id, f"{name} with random weights" if config["model"]["random_init"] else name


def _settings(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, str]:
    """Every hyper-parameter of the run that was set, and how it was laid out."""
    values: dict[str, Any] = {"seed": config["seed"], "model.dtype": manifest["dtype"]}
    for section, keys in (("data", _DATA_KEYS), ("train", _TRAIN_KEYS)):
        values.update((f"{section}.{key}", config[section].get(key)) for key in keys)
    values.update((f"layout.{key}", value) for key, value in manifest["layout"].items())
    return {key: _cell(value) for key, value in values.items() if value is not None}


def _cell(value: object) -> str:
    """`value` in one cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "/")


def _curve(steps: list[dict[str, Any]], folder: Path) -> str:
    """Markdown that shows the loss over the steps: a picture in `folder`, or one in the text."""
    x, y = [step["step"] for step in steps], [step["train_loss"] for step in steps]
    if importlib.util.find_spec("matplotlib") is None:
        return _svg(x, y)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(x, y, linewidth=1)
    axes.set(xlabel="step", ylabel="train loss (nats per supervised token)")
    axes.grid(alpha=0.3)
    figure.savefig(folder / CURVE, dpi=120)
    return f"![train loss over steps]({CURVE})"


def _svg(x: list[int], y: list[float]) -> str:
    """The curve as an SVG element."""
    width, height, low = 640, 240, min(y)
    across, down = max(x[-1] - x[0], 1), max(max(y) - low, 1e-9)
    points = " ".join(
        f"{(a - x[0]) / across * width:.1f},{height - (b - low) / down * height:.1f}"
        for a, b in zip(x, y, strict=True)
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="train loss over steps">'
        f'<polyline points="{points}" fill="none" stroke="currentColor"/></svg>'
    )
