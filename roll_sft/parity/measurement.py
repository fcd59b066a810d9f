"""What each rank measures in `roll-sft parity`; only numbers leave a rank."""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

TensorKind: TypeAlias = Literal["output", "gradient", "missing"]


@dataclass(frozen=True, slots=True)
class TensorError:
    """How far a parameter's gradient, or its module's output, is from that of transformers.

    `error` is the largest |difference| of a rank / the largest |reference| of the whole tensor.
    `name` is the parameter's, `hf_name` the one in which the largest difference lies, since one of
    Megatron's can be several of theirs.
    """

    kind: TensorKind
    name: str
    hf_name: str
    error: float


@dataclass(frozen=True, slots=True)
class TokenError:
    """The token whose loss is farthest from transformers': |difference| / max(reference, 1)."""

    sample: str  # "<name of the source>:<row>"
    position: int
    error: float


@dataclass(frozen=True, slots=True)
class RankParity:
    """What one rank measured of itself against transformers; only numbers leave a rank.

    `loss` and `worst_token` are None away from the last pipeline stage. `num_tokens` counts each
    token on one rank alone.
    """

    loss: float | None
    grad_norm: float
    num_tokens: int
    worst_token: TokenError | None
    tensors: tuple[TensorError, ...]


def badness(error: float) -> float:
    """An order of errors in which not-a-number is the worst."""
    return math.inf if math.isnan(error) else error
