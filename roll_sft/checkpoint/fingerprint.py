"""The settings that decide the loss curve. Resume compares them with the checkpoint's.

They are compared by name. What only changes speed (layout, packing, micro-batches, recomputation)
is not among them.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from roll_sft.base.errors import ConfigError
from roll_sft.checkpoint.manifest import RunState
from roll_sft.config.schema import RESUME_CHANGES

LOG = logging.getLogger(__name__)
# A change of these gives every source another address, so the address says nothing more then.
_BEHIND_THE_DATA = ("tokenizer", "chat_template", "template_kwargs", "sequence_length")
# Of a schedule: what it calls a value -> the key that sets it.
_KEYS = {"kind": "lr_scheduler_type", "peak": "learning_rate", "minimum": "min_learning_rate"}


def check_same_run(
    run: RunState, state: RunState, *, checkpoint: Path, allowed: Sequence[str]
) -> None:
    """Raise `ConfigError` where `run` differs from the `state` that wrote `checkpoint`.

    `allowed` names the differences that the user accepts.
    """
    found = changes(run, state)
    if state.step == 0:  # a converted model: weights to start from, and no run behind them
        return
    if state.optimizer_step is None:
        found["optimizer"] = "the checkpoint has none, so moments would begin at zero"
    refused = {name: what for name, what in found.items() if name not in allowed}
    if refused:
        lines = "; ".join(f"{name} ({what})" for name, what in refused.items())
        names = ",".join([*allowed, *refused])
        raise ConfigError(
            f"resume: {checkpoint} was written by a run that differs in {lines}; take the change"
            f" back, or accept it with 'checkpoint.allow_changes=[{names}]', or start in another"
            " output_dir"
        )
    for name, what in found.items():
        LOG.warning("goes on from %s with another %s: %s", checkpoint.name, name, what)


def changes(current: RunState, stored: RunState) -> dict[str, str]:
    """Name of each change since the checkpoint of `stored` -> what was and what is.

    Raises `ConfigError` for another dtype, other adapters, other frozen weights or another base
    model of these, which no flag allows.
    """
    if stored.dtype != current.dtype:
        raise ConfigError(
            f"model.dtype: {current.dtype!r}, and the checkpoint's is {stored.dtype!r};"
            f" set model.dtype={stored.dtype}, or start a new run from an export of it"
        )
    _check_lora(current.facts.get("lora"), stored.facts.get("lora"))
    _check_frozen(current.facts.get("frozen"), stored.facts.get("frozen"))
    was, now = _by_name(stored), _by_name(current)
    found = {
        name: "; ".join(_differences(was[name], now[name]))
        for name in RESUME_CHANGES
        if name in was and _plain(was[name]) != _plain(now[name])
    }
    if any(name in found for name in _BEHIND_THE_DATA):
        found.pop("data", None)
    return found


def _check_lora(current: Any, stored: Any) -> None:
    """Raise `ConfigError` where one has adapters and the other none, or they are not alike."""
    if not isinstance(current, Mapping) and not isinstance(stored, Mapping):
        return
    if not isinstance(current, Mapping):
        raise ConfigError(
            f"lora.rank: 0, and the checkpoint holds adapters of rank {stored.get('rank')}; set"
            f" lora.rank={stored.get('rank')}, or train the whole model that merge-lora makes of it"
        )
    if not isinstance(stored, Mapping):
        raise ConfigError(
            f"lora.rank: {current['rank']}, and the checkpoint holds a whole model; set"
            " lora.rank=0, or convert the checkpoint and give that folder as model.path"
        )
    stored = {"quantize_base": "none", **stored}  # checkpoints of before that key
    for name, value in current.items():
        if name == "base_path" or _plain(value) == stored.get(name):
            continue  # the same model may lie elsewhere
        if name == "base_model":
            raise ConfigError(
                f"model.path: the base model is {value}, and the adapters of the checkpoint were"
                f" trained on {stored.get(name)}; give that model, or start in another output_dir"
            )
        raise ConfigError(
            f"lora.{name}: {value}, and the checkpoint has {stored.get(name)}; take the change"
            " back, or start in another output_dir"
        )


def _check_frozen(current: Any, stored: Any) -> None:
    """Raise `ConfigError` where not the same is frozen, of which checkpoints hold nothing."""
    now, was = (each if isinstance(each, Mapping) else {} for each in (current, stored))
    if now.get("modules") != was.get("modules"):
        shown = [
            f"train.freeze={each.get('freeze', [])} and"
            f" train.num_layers_unfrozen={each.get('num_layers_unfrozen', -1)}"
            for each in (now, was)
        ]
        raise ConfigError(
            f"train.freeze: {shown[0]} do not freeze what the run of the checkpoint froze by"
            f" {shown[1]}; take the change back, or convert the checkpoint and give that folder as"
            " model.path"
        )
    if now.get("base_model") != was.get("base_model"):
        raise ConfigError(
            f"model.path: is the model {now['base_model']}, and the frozen weights of the"
            f" checkpoint are those of {was['base_model']}; give that model, or start in another"
            " output_dir"
        )


def _by_name(state: RunState) -> dict[str, Any]:
    """The settings of a run under the names that `checkpoint.allow_changes` has for them."""
    settings: dict[str, Any] = {
        **state.facts,
        "data": {"sources": state.sources, "shuffle": state.facts.get("shuffle", True)},
        "sequence_length": state.sequence_length,
        "global_batch_size": _batch(state.global_batch_size, state.global_batch_tokens),
        "seed": state.seed,
    }
    if isinstance(settings.get("schedule"), Mapping):
        settings["schedule"] = _schedule(settings["schedule"])
    return settings


def _schedule(values: Mapping[str, Any]) -> dict[str, Any]:
    """A schedule by the names of its keys, without what its kind does not use."""
    unused = {name for name, value in values.items() if value is None}
    unused |= set() if values.get("kind") == "wsd" else {"decay_steps"}
    return {_KEYS.get(name, name): each for name, each in values.items() if name not in unused}


def _batch(samples: int, tokens: int | None) -> dict[str, int]:
    return {"samples": samples} if tokens is None else {"tokens": tokens}


def _differences(stored: Any, current: Any, name: str = "") -> Iterator[str]:
    if isinstance(stored, Mapping) and isinstance(current, Mapping):
        for key in sorted({*stored, *current}):
            if _plain(stored.get(key)) != _plain(current.get(key)):
                yield from _differences(stored.get(key), current.get(key), f"{name}.{key}")
        return
    label = f"{name.lstrip('.')} " if name else ""
    yield f"{label}{stored!r} is now {current!r}"


def _plain(value: Any) -> Any:
    """`value` as it comes back from JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
