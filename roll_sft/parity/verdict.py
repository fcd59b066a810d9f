"""Red or green: what all ranks measured beside transformers, against what rounding explains.

Promises: not-a-number is red; a parameter that no rank has is red; of what is red, the first to be
computed is named, so that what it names is the fault and not its consequence.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from roll_sft.models.source import ModelSource
from roll_sft.models.weight_map import TiedHead, hf_names
from roll_sft.parity.measurement import RankParity, TensorError, TokenError, badness
from roll_sft.parity.oracle import Facts


@dataclass(frozen=True, slots=True)
class Tolerances:
    """The largest error of each measure: relative, or as `TensorError` and `TokenError` define."""

    output: float
    loss: float
    token_loss: float
    gradient: float
    grad_norm: float


# By the dtype of the run, for a model of LAYERS layers, beside transformers in fp32. Of fp32, loss
# and norm are what the project promises, the others two to six times what models of every family
# show. A number in bf16 is off by 2^-9 from the start.
TOLERANCES = {
    "fp32": Tolerances(output=1e-5, loss=1e-6, token_loss=2e-6, gradient=1e-5, grad_norm=5e-5),
    "bf16": Tolerances(output=1e-1, loss=1e-2, token_loss=1e-1, gradient=2e-1, grad_norm=2e-2),
}
LAYERS = 4


def tolerances(dtype: str, *, num_layers: int) -> Tolerances:
    """What a run may differ by: rounding adds up over layers, in all but the mean of many losses.

    Seen at 28 layers: three to eight times the errors of 4 layers.
    """
    base, growth = TOLERANCES[dtype], max(1.0, math.sqrt(num_layers / LAYERS))
    grown = {name: value * growth for name, value in dataclasses.asdict(base).items()}
    return Tolerances(**{**grown, "loss": base.loss})


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the answer: an error, where it is the largest, and how large it may be."""

    what: str
    where: str
    measured: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether it is green; not-a-number is not."""
        return self.measured <= self.tolerance


@dataclass(frozen=True, slots=True)
class Verdict:
    """All checks; and if one is red, where the two computations part."""

    checks: tuple[Check, ...]
    first_difference: str | None


def judge(ranks: Sequence[RankParity], facts: Facts, *, source: ModelSource, dtype: str) -> Verdict:
    """What `ranks` measured, against the tolerances of a run in `dtype`."""
    allowed = tolerances(dtype, num_layers=source.shape.num_layers)
    measured = _measured(ranks, facts, source)
    checks = _checks(measured, allowed)
    if all(check.holds for check in checks):
        return Verdict(checks, None)
    return Verdict(checks, _first_difference(measured, allowed))


@dataclass(frozen=True, slots=True)
class _Measured:
    """The errors of all ranks; tensors in the order in which they are computed."""

    num_tokens: int
    num_lost: int
    outputs: list[TensorError]
    loss: float
    token: TokenError
    gradients: list[TensorError]
    grad_norm: float


def _measured(ranks: Sequence[RankParity], facts: Facts, source: ModelSource) -> _Measured:
    losses = [abs(rank.loss / facts.loss - 1) for rank in ranks if rank.loss is not None]
    norms = [abs(rank.grad_norm / facts.grad_norm - 1) for rank in ranks]
    tokens = [rank.worst_token for rank in ranks if rank.worst_token is not None]
    num_tokens = sum(rank.num_tokens for rank in ranks)
    tensors = [*(tensor for rank in ranks for tensor in rank.tensors), *_missing(ranks, source)]
    place = _place_in_forward(facts, source)
    return _Measured(
        num_tokens=num_tokens,
        num_lost=abs(num_tokens - facts.supervised_tokens),
        outputs=sorted(
            (tensor for tensor in tensors if tensor.kind != "gradient"),
            key=lambda tensor: (place(tensor), -badness(tensor.error)),
        ),
        loss=max(losses, key=badness),
        token=max(tokens, key=lambda token: badness(token.error)),
        gradients=sorted(
            (tensor for tensor in tensors if tensor.kind == "gradient"),
            key=lambda tensor: (-place(tensor), -badness(tensor.error)),
        ),
        grad_norm=max(norms, key=badness),
    )


def _missing(ranks: Sequence[RankParity], source: ModelSource) -> Iterator[TensorError]:
    """Parameters of the family's table that no rank has."""
    present = {tensor.name for rank in ranks for tensor in rank.tensors}
    for name, mapping in source.family.weights(source.shape).items():
        if name not in present and not isinstance(mapping, TiedHead):
            yield TensorError("missing", name, hf_names(mapping)[0], float("inf"))


def _place_in_forward(facts: Facts, source: ModelSource) -> Callable[[TensorError], int]:
    """The place of a tensor among the modules, in the order in which transformers runs them."""
    modules = [name.rpartition(".")[0] for name in facts.largest_output]
    # Also where it is the embedding: its gradient is the first to be known in part.
    head = hf_names(source.family.weights(source.shape)["output_layer.weight"])[0]

    def place(tensor: TensorError) -> int:
        if tensor.hf_name == head and tensor.kind != "output":
            return len(modules)
        return modules.index(tensor.hf_name.rpartition(".")[0])

    return place


def _checks(measured: _Measured, allowed: Tolerances) -> tuple[Check, ...]:
    token = measured.token
    return (
        _tensor_check("outputs of {} modules", measured.outputs, allowed.output),
        Check("tokens lost", "", measured.num_lost, 0.0),
        Check("loss", "", measured.loss, allowed.loss),
        Check(
            f"losses of {measured.num_tokens} tokens",
            f"{token.sample}, token {token.position}",
            token.error,
            allowed.token_loss,
        ),
        _tensor_check("gradients of {} parameters", measured.gradients, allowed.gradient),
        Check("gradient norm", "", measured.grad_norm, allowed.grad_norm),
    )


def _tensor_check(what: str, tensors: Sequence[TensorError], tolerance: float) -> Check:
    worst = max(tensors, key=lambda tensor: badness(tensor.error))
    num_tensors = len({tensor.name for tensor in tensors})
    return Check(what.format(num_tensors), worst.hf_name, worst.error, tolerance)


def _first_difference(measured: _Measured, allowed: Tolerances) -> str:
    """Where the two computations part: forward, then in the losses, then on the way back."""
    output = next((t for t in measured.outputs if not t.error <= allowed.output), None)
    gradient = next((t for t in measured.gradients if not t.error <= allowed.gradient), None)
    token, back = measured.token, ""
    if output is not None and output.kind == "missing":
        return f"{_both_names(output)} is on no rank; every module before it agrees"
    if output is not None:
        return (
            f"the output of {_both_names(output)} differs by {output.error:.1e}, and"
            f" {allowed.output:.1e} is allowed; every module before it agrees"
        )
    if gradient is not None:
        back = f"; first tensor: the gradient of {_both_names(gradient)}, by {gradient.error:.1e}"
    if not token.error <= allowed.token_loss:
        return (
            f"the loss of {token.sample} at token {token.position} differs by {token.error:.1e}"
            f" though every module's output agrees, so look at labels, loss mask and head{back}"
        )
    if measured.num_lost:
        return f"{measured.num_lost} supervised tokens are lost or too many; the others agree"
    if not measured.loss <= allowed.loss:
        return f"the loss differs by {measured.loss:.1e} though that of every token agrees"
    if gradient is not None:
        return f"outputs and losses agree, so look at the backward pass{back}"
    return f"every tensor agrees, but the gradient norm differs by {measured.grad_norm:.1e}"


def _both_names(tensor: TensorError) -> str:
    return f"{tensor.hf_name} ({tensor.name})"
