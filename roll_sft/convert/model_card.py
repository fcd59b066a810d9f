"""The model card of an export: `README.md` and the curve of the loss, from the run's own files.

Shows names, counts and settings, and no path, address or secret: of `config.yaml` only the keys
listed here are taken, as they were composed; of the source's own card its licence, languages and
base. Promise: whatever is missing or damaged beside the checkpoint, the export is made; a card says
what it can.
"""

import importlib.util
import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from roll_sft.base.files import json_lines
from roll_sft.checkpoint.manifest import ASSETS, Manifest
from roll_sft.data.rows.file_lists import is_on_hub
from roll_sft.models.files.hub import HUB_ID

LOG = logging.getLogger(__name__)
CARD = "README.md"
CURVE = "loss.png"
LICENCE = ("license", "license_name", "license_link")
# What files that were changed by hand, cut or swapped make of their readers and of the template.
DAMAGE = (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError,
          RuntimeError, ImportError, yaml.YAMLError)  # fmt: skip
_TRAIN_KEYS = (
    "global_batch_size", "global_batch_tokens", "num_train_epochs", "max_steps", "learning_rate",
    "min_learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_eps", "max_grad_norm",
)  # fmt: skip
_DATA_KEYS = ("sequence_length", "packing", "train_on", "shuffle")
_LORA_KEYS = ("rank", "alpha", "dropout", "use_rslora", "init", "quantize_base")
_EXPERT_KEYS = frozenset({"num_experts", "num_local_experts", "n_routed_experts"})
_COUNTS = ("rows", "kept", "tokens", "supervised_tokens")
_TEMPLATE = """\
---
{{ metadata }}
---

# {{ run_name }}

{{ base }}, fine-tuned with roll_sft on Megatron-Core: step {{ step }} of the run, exported in
{{ dtype }}. Written with {{ versions | join(", ") }}.
{%- if adapts_experts %}

Routed experts and routers have no adapters: they are the base's.
{%- endif %}
{%- if sources %}

## Data

| source | rows | kept | tokens | supervised tokens |
|---|---:|---:|---:|---:|
{%- for row in sources %}
| {{ row | join(" | ") }} |
{%- endfor %}
{%- endif %}
{%- if losses %}

## Loss

{{ curve }}

First step {{ losses[0] }}, last step {{ losses[-1] }}, in nats per supervised token.
{%- endif %}
{%- if validation %}

| validation set | step | loss | perplexity |
|---|---:|---:|---:|
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


@dataclass(frozen=True, slots=True)
class _Run:
    """Values from the files of a run; empty where a file is missing or damaged."""

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[Mapping[str, Any], ...] = ()
    losses: tuple[tuple[int, float], ...] = ()  # (step, train loss)
    validation: tuple[tuple[str, int, float], ...] = ()  # (set, step, loss), the newest of each
    is_adapter: bool = False  # the folder holds one, and no whole model
    has_experts: bool = False


def write_card(
    checkpoint: Path, folder: Path, *, manifest: Manifest, dtype: str, is_adapter: bool = False
) -> None:
    """Put README.md and the loss's curve into the model `folder`, which is in `dtype`.

    A checkpoint of step 0 is a model that was converted and not trained: it keeps its own.
    """
    if manifest.state.step == 0:
        return
    home = checkpoint.resolve().parents[1]
    model = _read(checkpoint / ASSETS / "config.json", json.loads)
    run = replace(
        _read_run(home, until=manifest.state.step),
        is_adapter=is_adapter,
        has_experts=not _EXPERT_KEYS.isdisjoint(model),
    )
    source = _metadata_of(checkpoint / ASSETS / CARD)
    try:
        text = _render(run, home, folder=folder, manifest=manifest, source=source, dtype=dtype)
    except DAMAGE as error:
        LOG.warning("the model card has no details of the run: %s: %s", type(error).__name__, error)
        text = _render(
            _Run(home.name, is_adapter=is_adapter),
            home,
            folder=folder,
            manifest=manifest,
            source={},
            dtype=dtype,
        )
    (folder / CARD).write_text(text, encoding="utf-8")


def _read_run(home: Path, *, until: int) -> _Run:
    """The files of the run in `home`, up to step `until`."""
    config = _read(home / "config.yaml", yaml.safe_load)
    report = _read(home / "data_report.json", json.loads)
    sources = report.get("sources")
    steps = [line for line in json_lines(home / "steps.jsonl") if _is_until(line, until)]
    evals = [line for line in json_lines(home / "eval.jsonl") if _is_until(line, until)]
    newest = {str(line.get("name")): line for line in evals if _is_number(line.get("loss"))}
    return _Run(
        name=_text(config.get("run_name")) or home.name,
        config=config,
        sources=tuple(filter(_is_counted, sources)) if isinstance(sources, list) else (),
        losses=tuple(
            (line["step"], float(line["train_loss"]))
            for line in steps
            if _is_number(line.get("train_loss"))
        ),
        validation=tuple(
            (name, line["step"], float(line["loss"])) for name, line in newest.items()
        ),
    )


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        return _mapping(parse(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except DAMAGE as error:
        LOG.warning("%s: cannot be read (%s); the model card leaves it out", path, error)
        return {}


def _metadata_of(card: Path) -> dict[str, Any]:
    """The metadata of the source's own card."""
    try:
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        found = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
        return _mapping(yaml.safe_load(found[1])) if found else {}
    except DAMAGE:
        return {}


def _render(
    run: _Run,
    home: Path,
    *,
    folder: Path,
    manifest: Manifest,
    source: Mapping[str, Any],
    dtype: str,
) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    hub_id, base = _base_model(run, source)
    # Names come from files and from people: escaped as HTML, and no `|` ends a cell of a table.
    environment = Environment(
        undefined=StrictUndefined, autoescape=True, keep_trailing_newline=True
    )
    return environment.from_string(_TEMPLATE).render(
        metadata=Markup(_metadata(run, home, source=source, hub_id=hub_id)),
        run_name=_cell(run.name),
        base=base,
        adapts_experts=run.has_experts and "lora" in manifest.state.facts,
        step=manifest.state.step,
        dtype=dtype,
        versions=[f"{name} {version}" for name, version in manifest.versions.items()],
        sources=[
            [_cell(each.get("name")), *(f"{each[key]:,}" for key in _COUNTS)]
            for each in run.sources
        ],
        losses=[f"{loss:.4f}" for _, loss in run.losses],
        validation=[
            [_cell(name), step, f"{loss:.4f}", f"{math.exp(min(loss, 700.0)):.4g}"]
            for name, step, loss in run.validation
        ],
        settings=_settings(run.config, manifest),
        curve=Markup(_curve(run.losses, folder)) if run.losses else "",
    )


def _metadata(run: _Run, home: Path, *, source: Mapping[str, Any], hub_id: str | None) -> str:
    """The head of the card, as the hub reads it: YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    languages = source.get("language")
    languages = languages if isinstance(languages, list) else [languages]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name,
            metric_type=metric,
            metric_value=round(value, 6),
        )
        for name, _, loss in run.validation
        for metric, value in (("loss", loss), ("perplexity", math.exp(min(loss, 700.0))))
    ]
    data = ModelCardData(
        base_model=hub_id,
        base_model_relation=("adapter" if run.is_adapter else "finetune") if hub_id else None,
        datasets=_datasets(run.config, home) or None,
        eval_results=results or None,
        metrics=["perplexity"] if results else None,
        model_name=run.name if results else None,
        language=[*filter(_text, languages)] or None,
        library_name="peft" if run.is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["sft", "roll_sft", "megatron-core", *(["lora"] if run.is_adapter else [])],
        **{key: source[key] for key in LICENCE if _text(source.get(key))},
    )
    return str(data.to_yaml()).strip()


def _base_model(run: _Run, source: Mapping[str, Any]) -> tuple[str | None, str]:
    """The hub id of the base model, if known, and its display name."""
    model = _mapping(run.config.get("model"))
    path = _text(model.get("path")) or "a model"
    in_cache = re.search(r"models--([\w.-]+?)--([\w.-]+)", path)
    hub_id = "/".join(in_cache.groups()) if in_cache else None
    if hub_id is None and HUB_ID.fullmatch(path) and not Path(path).exists():
        hub_id = path
    name = _cell(hub_id or Path(path).name)
    if model.get("random_init"):
        return None, f"{name} with random weights"
    # A local copy has no id; its card may name what it was made from.
    known = _text(source.get("base_model"))
    if hub_id is None and HUB_ID.fullmatch(known):
        hub_id = known
    return hub_id, name


def _datasets(config: Mapping[str, Any], home: Path) -> list[str]:
    """The hub ids of the training data sets; local files have none."""
    entries = _mapping(config.get("data")).get("train")
    entries = entries if isinstance(entries, list) else []
    paths = [_text(_mapping(each).get("path")) for each in entries]
    names = (
        "/".join(path.split("/")[:2])  # a third part is the dataset's configuration
        for path in paths
        # The run's folder may have been converted elsewhere than where it was given relative paths.
        if is_on_hub(path) and not any((parent / path).exists() for parent in home.parents)
    )
    return list(dict.fromkeys(names))


def _settings(config: Mapping[str, Any], manifest: Manifest) -> dict[str, str]:
    """Every hyper-parameter of the run that was set, and how it was laid out."""
    values: dict[str, Any] = {"seed": manifest.state.seed, "model.dtype": manifest.state.dtype}
    is_lora = "lora" in manifest.state.facts
    lora = [("lora", _LORA_KEYS)] if is_lora else []
    for section, keys in (("data", _DATA_KEYS), ("train", _TRAIN_KEYS), *lora):
        given = _mapping(config.get(section))
        values.update((f"{section}.{key}", given.get(key)) for key in keys)
    layout = manifest.state.layout
    values.update((f"layout.{key}", getattr(layout, key)) for key in type(layout).__slots__)
    return {k: _cell(v) for k, v in values.items() if isinstance(v, int | float | str)}


def _cell(value: object) -> str:
    """`value` in one cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "/")


def _is_until(line: Mapping[str, Any], step: int) -> bool:
    return type(line.get("step")) is int and line["step"] <= step


def _is_counted(source: object) -> bool:
    return isinstance(source, dict) and all(type(source.get(key)) is int for key in _COUNTS)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _curve(losses: Sequence[tuple[int, float]], folder: Path) -> str:
    """Markdown that shows the loss over the steps: a picture in `folder`, or one in the text."""
    x, y = [step for step, _ in losses], [loss for _, loss in losses]
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
