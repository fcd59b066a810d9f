"""What a run's path of optimisation depends on, so that a later run can tell whether it goes on.

Compared by name with what a checkpoint's manifest has. What only changes speed (layout, packing,
micro-batches, recomputation) is not here.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from roll_sft.base.errors import ConfigError
from roll_sft.checkpoint.manifest import RunState
from roll_sft.config.schema import RESUME_CHANGES

if TYPE_CHECKING:  # the workers, who read manifests, need no transformers
    from roll_sft.job.prepare import Job

# A change of these gives every source another address, so the address says nothing more then.
_BEHIND_THE_DATA = ("tokenizer", "chat_template", "template_kwargs", "sequence_length")
# Of a schedule: what it calls a value -> the key that sets it.
_KEYS = {"kind": "lr_scheduler_type", "peak": "learning_rate", "minimum": "min_learning_rate"}
_OPTIMIZER = ("weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "max_grad_norm")


def facts_of(job: "Job") -> dict[str, object]:
    """What the manifest keeps of `job` beside its seed, sizes and sources, in JSON's types."""
    tokenizer, train = job.tokenizer, job.config.train
    backend = getattr(tokenizer, "backend_tokenizer", None)  # a slow tokenizer has none
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return {
        "tokenizer": _digest(text),
        "chat_template": _digest(str(tokenizer.chat_template)),
        "template_kwargs": job.config.data.template_kwargs,
        "schedule": dataclasses.asdict(job.schedule),
        "optimizer": {name: getattr(train, name) for name in _OPTIMIZER},
        "shuffle": job.config.data.shuffle,
    }


def changes(job: "Job", state: RunState) -> dict[str, str]:
    """Name of each change since the checkpoint of `state` -> what was and what is.

    Raises `ConfigError` for another dtype, which no flag allows.
    """
    config, facts = job.config, facts_of(job)
    if state.dtype != config.model.dtype:
        raise ConfigError(
            f"model.dtype: {config.model.dtype!r}, and the checkpoint's is {state.dtype!r};"
            f" set model.dtype={state.dtype}, or start a new run from an export of it"
        )
    stored: dict[str, Any] = {"sequence_length": state.sequence_length, "seed": state.seed}
    stored |= state.facts
    if isinstance(stored.get("schedule"), Mapping):
        stored["schedule"] = _schedule(stored["schedule"])
    current: dict[str, Any] = {
        "data": job.source_addresses,
        "tokenizer": facts["tokenizer"],
        "chat_template": facts["chat_template"],
        "template_kwargs": facts["template_kwargs"],
        "sequence_length": config.data.sequence_length,
        "global_batch_size": _batch(
            config.train.global_batch_size, config.train.global_batch_tokens
        ),
        "seed": config.seed,
        "schedule": _schedule(dataclasses.asdict(job.schedule)),
        "optimizer": facts["optimizer"],
    }
    stored["global_batch_size"] = _batch(state.global_batch_size, state.global_batch_tokens)
    stored["data"] = {"sources": state.sources, "shuffle": state.facts.get("shuffle", True)}
    current["data"] = {"sources": job.source_addresses, "shuffle": config.data.shuffle}
    found = {
        name: "; ".join(_differences(stored[name], current[name]))
        for name in RESUME_CHANGES
        if name in stored and _plain(stored[name]) != _plain(current[name])
    }
    if any(name in found for name in _BEHIND_THE_DATA):
        found.pop("data", None)
    return found


def _schedule(values: Mapping[str, Any]) -> dict[str, Any]:
    """A schedule by the names of its keys, without what its kind does not use."""
    unused = () if values.get("kind") == "wsd" else ("decay_steps",)
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


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
