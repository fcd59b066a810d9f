"""The configuration of ours that is being made, with the origin of each line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from roll_sft.config.fields import Key, all_keys
from roll_sft.config.schema import RunConfig
from roll_sft.migrate.given import Given

OUR_KEYS: Mapping[str, Key] = {key.name: key for key in all_keys(RunConfig)}
# Values by which other trainers say that something is off.
OFF: tuple[Any, ...] = (None, False, "", "none", "None", "no", "false", 0, [], {})


@dataclass(frozen=True, slots=True)
class Batch:
    """An optimizer step of theirs, over all data-parallel ranks."""

    rows: int
    packed_tokens: int | None = None  # of a row, where a row is a pack of samples
    drops_last: bool = False  # whether an epoch's last, short batch is left out


@dataclass(slots=True)
class Draft:
    """Our keys with their values and where each comes from, and what could not be mapped."""

    rival: str
    lines: dict[str, tuple[Any, str]] = field(default_factory=dict)  # our key -> value, origin
    used: list[str] = field(default_factory=list)  # without a line of their own
    not_needed: dict[str, str] = field(default_factory=dict)  # their key -> why
    unsupported: dict[str, str] = field(default_factory=dict)  # their key -> why, what to do
    secrets: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    to_set: list[str] = field(default_factory=list)  # what a run would refuse
    batch: Batch | None = None

    def set(self, key: str, value: Any, origin: str) -> None:
        """Set our `key`; a value of ours that is no choice of the key is told as unsupported."""
        choices = _choices(key)
        wrong = [each for each in _listed(value) if choices and each not in choices]
        if wrong:
            self.unsupported[origin] = (
                f"{key} does not offer {wrong[0]}; one of {', '.join(choices)}"
            )
            value = [each for each in _listed(value) if each in choices]
            if not isinstance(OUR_KEYS[key].default, list):
                return
        self.lines[key] = (value, origin)

    def set_default(self, key: str, value: Any, their_key: str) -> None:
        """Set what `their_key` defaults to there, where our default is another."""
        if OUR_KEYS[key].default != value:
            self.set(key, value, f"{self.rival}'s default of {their_key}")

    def copy(
        self,
        given: Given,
        keys: Mapping[str, str | Sequence[str]],
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """Copy values that mean the same: our key -> their names; `defaults` by our key."""
        for key, names in keys.items():
            names = (names,) if isinstance(names, str) else names
            found, value = given.name_of(*names), given.take(*names)
            if found is not None:
                self.set(key, _typed(key, value), f"{found}: {shown_value(value)}")
            elif defaults and key in defaults:
                self.set_default(key, defaults[key], names[0])

    def cannot(self, name: str, value: Any, why: str) -> None:
        """Tell that `name` of theirs with `value` has no counterpart; `why` says what to do."""
        self.unsupported[f"{name}: {shown_value(value)}"] = why

    def value(self, key: str) -> Any:
        """The value of our `key` so far, its default where it is not set."""
        return self.lines[key][0] if key in self.lines else OUR_KEYS[key].default


def shown_value(value: Any) -> str:
    """`value` on one line, as YAML writes it, short."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _typed(key: str, value: Any) -> Any:
    """`value` with the type of our key: whole numbers where these are asked for, text as text."""
    kind = OUR_KEYS[key].kind
    if isinstance(value, float) and value == int(value) and kind in (int, int | None):
        return int(value)
    if not isinstance(value, bool) and isinstance(value, int) and kind is float:
        return float(value)
    if kind in (str, str | None) and not isinstance(value, str):
        return str(value)
    return value


def _choices(key: str) -> Sequence[str]:
    """The texts that `key` takes; empty where it takes other values too."""
    about = OUR_KEYS[key]
    return about.choices if about.is_text or about.choices else ()


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
