"""The section `cluster`: the Ray cluster, the deadlines of each phase, and restarts."""

from dataclasses import dataclass

from roll_sft.config.keeping import GraceKey
from roll_sft.config.keys import key


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig(GraceKey):
    """The Ray cluster, its deadlines, and what follows a failure."""

    address: str | None = key(
        None,
        "host:port of a Ray cluster to join; null takes RAY_ADDRESS, or starts a cluster here.",
    )
    prepare_timeout_s: float = key(
        3600.0,
        "Longest time in which preparing the data finishes no shard.",
        unit="seconds",
        above=0,
        at_most=1e7,
    )
    setup_timeout_s: float = key(
        900.0,
        "Longest start of the workers, with loading the model.",
        unit="seconds",
        above=0,
        at_most=1e7,
    )
    step_timeout_s: float = key(
        1800.0,
        "Longest time in which a step or an evaluation finishes no micro-batch.",
        unit="seconds",
        above=0,
        at_most=1e7,
    )
    checkpoint_timeout_s: float = key(
        3600.0,
        "Longest save of a checkpoint.",
        unit="seconds",
        above=0,
        at_most=1e7,
    )
    max_restarts: int = key(
        3,
        "Restarts of the workers after failures before the run ends with exit code 7; the loss of"
        " a node is not counted.",
        unit="restarts",
        at_least=0,
    )
    elastic: bool = key(
        False,
        "Where nodes are lost and no others are there, go on with fewer data ranks.",
    )
