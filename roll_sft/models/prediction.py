"""The layers for multi-token prediction behind a model's last one: kept as they are, not trained.

A checkpoint holds each of their tensors under its HuggingFace name behind `KEPT`. So an export has
them again, to the last bit unless it changes the dtype.
"""

from collections.abc import Iterable, Mapping

from roll_sft.models.files.safetensors_in import SafetensorsSource, Shape, StoredSource
from roll_sft.models.source import ModelSource
from roll_sft.models.weight_map import SingleTensor, WeightTable

KEPT = "prediction."
_MARK = ".eh_proj.weight"  # what such a layer alone has


def prediction_names(names: Iterable[str]) -> list[str]:
    """Those of `names` that belong to layers for multi-token prediction, in order."""
    names = sorted(names)
    layers = tuple(name.removesuffix(_MARK) + "." for name in names if name.endswith(_MARK))
    return [name for name in names if name.startswith(layers)]


def kept_weights(shapes: Mapping[str, Shape]) -> WeightTable:
    """A mapping for each of these tensors, of names and shapes as HuggingFace has them."""
    return {
        f"{KEPT}{name}": SingleTensor(name, shape, is_fp32=name.endswith("_correction_bias"))
        for name, shape in shapes.items()
    }


def kept_of(source: SafetensorsSource) -> WeightTable:
    """`kept_weights` of the layers for multi-token prediction in `source`."""
    return kept_weights({name: source.shape(name) for name in prediction_names(source.names())})


def kept_source(source: ModelSource) -> SafetensorsSource | None:
    """The files that have such layers of the model `source`; None if it has no files."""
    if source.opened is not None or source.seed is not None:
        return None
    folder = source.folder if source.hub is None else source.hub.folder()
    assert folder is not None, "a model without weights"
    return SafetensorsSource(folder)


class WithoutPrediction(SafetensorsSource):
    """The files of a model without its layers for multi-token prediction."""

    def names(self) -> frozenset[str]:
        """Every tensor of the other layers."""
        names = super().names()
        return names - frozenset(prediction_names(names))


def without_prediction(source: SafetensorsSource) -> StoredSource:
    """`source`, without its layers for multi-token prediction if it has such."""
    return WithoutPrediction(str(source)) if prediction_names(source.names()) else source
