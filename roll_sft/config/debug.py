"""The section `debug`: faults that a run plants in itself, to rehearse what it does then."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from roll_sft.config.keys import key

if TYPE_CHECKING:
    from roll_sft.config.schema import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultConfig:
    """A fault, which happens once in an output folder."""

    kind: Literal["kill", "stop", "hang", "spin", "error", "nan", "full_disk"] = key(
        "kill",
        "What happens: SIGKILL, SIGSTOP, a sleep, a held interpreter, an error, a NaN in a weight,"
        " or a disk that is full.",
    )
    where: Literal["start", "setup", "step", "evaluation", "checkpoint"] = key(
        "step", "Phase in which it happens."
    )
    step: int = key(
        1, "Step in which, or after which, it happens; not for start and setup.", at_least=1
    )
    rank: int = key(0, "Rank to which it happens.", at_least=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DebugConfig:
    """Faults to rehearse; none by default."""

    faults: list[FaultConfig] = key([], "Faults to plant, for tests and rehearsals.")


def fault_problems(config: "RunConfig") -> Iterator[str]:
    """One line for each fault that cannot happen."""
    for index, fault in enumerate(config.debug.faults):
        where = f"debug.faults[{index}]"
        if fault.rank >= config.parallel.num_workers:
            yield (
                f"{where}.rank: {fault.rank} must be below parallel.num_workers"
                f" {config.parallel.num_workers}"
            )
        wanted = {"nan": "step", "full_disk": "checkpoint"}.get(fault.kind, fault.where)
        if fault.where != wanted:
            yield f"{where}.where: {fault.where} must be {wanted} for kind={fault.kind}; set it"
