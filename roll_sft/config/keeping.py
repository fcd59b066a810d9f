"""Keys of `train` and `cluster` for runs that are stopped, and for numbers that are not sound."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from roll_sft.base.text import shown
from roll_sft.config.keys import key

if TYPE_CHECKING:
    from roll_sft.config.schema import RunConfig

_DURATION = re.compile(r"(?=.)(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s?)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepingKeys:
    """The section `train` has these keys beside its own."""

    max_duration: str | None = key(
        None,
        "Wall-clock limit of a command, in seconds or as 1h30m; cluster.grace_s before it the run"
        " saves and ends.",
    )
    on_nan: Literal["error", "skip"] = key(
        "error",
        "A loss or gradient that is not finite makes no update; error ends the run, skip goes on.",
    )
    spike_sigma: float | None = key(
        6.0,
        "A loss or gradient norm so far above the mean of 128 steps is a spike, and is recorded;"
        " null looks for none.",
        unit="standard deviations",
        above=0,
        at_most=1e6,
    )
    on_spike: Literal["record", "skip"] = key(
        "record", "What happens at a spike: skip makes no update of it, on any rank."
    )
    max_skipped_steps: int = key(
        10, "Steps that may be skipped before the run ends as diverged.", unit="steps", at_least=0
    )

    @property
    def duration_s(self) -> float | None:
        """`max_duration` in seconds."""
        return None if self.max_duration is None else seconds_of(self.max_duration)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraceKey:
    """The section `cluster` has this key beside its own."""

    grace_s: float = key(
        60.0,
        "Longest time from a signal to the end of the run, in which it saves.",
        unit="seconds",
        at_least=1,
        at_most=1e7,
    )
    straggler_factor: float | None = key(
        1.5,
        "A rank that takes so many times as long as the others in most of 20 steps is named; null"
        " looks for none.",
        above=1,
        at_most=1e6,
    )


def seconds_of(duration: str) -> float | None:
    """The seconds of a duration such as 5400, 90m or 1h30m; None for any other text."""
    match = _DURATION.fullmatch(duration.replace(" ", ""))
    if match is None:
        return None
    try:
        hours, minutes, seconds = (float(part or 0) for part in match.groups())
    except ValueError:  # two points in a number
        return None
    return 3600 * hours + 60 * minutes + seconds


def keeping_problems(config: "RunConfig") -> Iterator[str]:
    """What is wrong with these keys, alone and with the other sections."""
    train, grace_s = config.train, config.cluster.grace_s
    if train.max_duration is not None:
        seconds = seconds_of(train.max_duration)
        if seconds is None:
            yield (
                f"train.max_duration: {shown(train.max_duration)} is no duration; give seconds, or"
                " hours, minutes and seconds such as 1h30m"
            )
        elif seconds <= grace_s:
            yield (
                f"train.max_duration: {train.max_duration} leaves no time before the"
                f" cluster.grace_s={grace_s:g} in which the run saves and ends; raise it"
            )
    if train.on_spike == "skip" and train.spike_sigma is None:
        yield (
            "train.on_spike: skip has no effect with train.spike_sigma=null; give a number of"
            " standard deviations such as 6"
        )
