"""Whether weights are numbers: one pass over many tensors, and one wait for the device.

The Euclidean norm of all is finite where every number is finite and below about 1e19; beyond that
no model of ours computes. Only where it is not is each tensor looked at, to name one.
"""

from collections.abc import Iterable

import torch
from megatron.core.models.gpt import GPTModel

from roll_sft.base.errors import CheckpointError, DivergedError
from roll_sft.checkpoint.tensors import Piece
from roll_sft.engine.build import named_parameters
from roll_sft.models.family import Family, ModelShape
from roll_sft.models.safetensors_in import TensorSource


def check_given(
    chunks: list[GPTModel], family: Family, shape: ModelShape, *, source: TensorSource
) -> None:
    """Raise `CheckpointError` that names a tensor of `source` which is not finite in `chunks`."""
    found = not_finite(list(named_parameters(chunks)))
    if found is None:
        return
    name, what = found
    for hf_name in family.weights(shape)[name].hf_shapes:  # one of ours may be several of theirs
        if theirs := not_finite([(hf_name, source.read(hf_name))]):
            name, what = theirs
            break
    raise CheckpointError(
        f"model.path: {source}: {name} {what}, so no step can be computed; take another copy of the"
        " model, or an earlier checkpoint of the run that made it"
    )


def check_loaded(chunks: list[GPTModel], folder: object) -> None:
    """As `check_given`, of weights that came from the checkpoint in `folder`."""
    if found := not_finite(list(named_parameters(chunks))):
        raise CheckpointError(
            f"{folder}: {found[0]} {found[1]}: the run had diverged by then; go back to an earlier"
            " step folder with resume="
        )


def check_state(pieces: Iterable[Piece]) -> None:
    """Raise `DivergedError` where a rank's part of a checkpoint is not finite."""
    if found := not_finite([(piece.key, piece.tensor) for piece in pieces]):
        raise DivergedError(f"{found[0]} {found[1]}")


def not_finite(tensors: list[tuple[str, torch.Tensor]]) -> tuple[str, str] | None:
    """(name, what is wrong) of the first of named `tensors` that is not finite; None where all are.

    Tensors of any shape and floating dtype, on one device.
    """
    with torch.no_grad():
        total = torch.nn.utils.get_total_norm([tensor for _, tensor in tensors])
        if total.isfinite():
            return None
        for name, tensor in tensors:
            if count := tensor.numel() - int(tensor.isfinite().sum()):
                return name, f"holds {count} numbers that are not finite"
        name, largest = max(
            ((name, float(tensor.abs().max())) for name, tensor in tensors if tensor.numel()),
            key=lambda each: each[1],
        )
    return name, f"reaches {largest:.3g}, which overflows"
