"""What an engine is built from. Imports no Megatron, so the driver can make these and send them."""

from dataclasses import dataclass

from roll_sft.data.cache import TokenSet
from roll_sft.models.hf_io import TensorSource
from roll_sft.models.spec import Family, ModelShape


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What is trained: its family and shape, and where its weights come from."""

    family: Family
    shape: ModelShape
    tensors: TensorSource


@dataclass(frozen=True, slots=True)
class TokenData:
    """The token caches of a run: one set to train on, validation sets by name."""

    train: TokenSet
    validation: dict[str, TokenSet]
