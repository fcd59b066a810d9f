"""What adapters add to a rank's memory, in numbers; `memory` turns them into bytes."""

from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.models.adapters.adapter import adapted_weights, saved_weights
from roll_sft.models.shape import ModelShape
from roll_sft.models.source import family_named


def adapter_parameters(config: RunConfig, shape: ModelShape, *, stage: int) -> tuple[float, float]:
    """What a rank of `stage` trains: of adapters, and of the embedding and head beside them."""
    layout, lora = layout_of(config.parallel), config.lora
    family, of_model = family_named(shape.architecture), 0.0
    for weight in adapted_weights(family, shape, lora).values():
        inputs = len(weight.modules) * weight.num_inputs
        outputs = sum(map(weight.num_outputs, weight.modules))
        cut, whole = (inputs, outputs) if weight.is_row_parallel else (outputs, inputs)
        of_model += lora.rank * (cut / layout.tensor_size + whole)
    is_first, is_last = stage == 0, stage == layout.pipeline_size - 1
    ends = sum(
        is_first if name.startswith("embedding") else is_last
        for name in saved_weights(family, shape, lora)
    )
    embedding = shape.padded_vocab_size(layout.tensor_size) * shape.hidden_size
    share = -(-shape.num_layers // layout.pipeline_size) / shape.num_layers
    return of_model * share, ends * embedding / layout.tensor_size


def saved_by_quantization(
    config: RunConfig, shape: ModelShape, *, weight_bytes: int
) -> tuple[float, float]:
    """Bytes that `lora.quantize_base` saves a rank, and numbers of the widest weight dequantised.

    The latter are there while a layer is computed, or its backward.
    """
    if config.lora.quantize_base == "none":
        return 0.0, 0.0
    from roll_sft.models.adapters.nf4 import bytes_of, quantized_weights

    layout = layout_of(config.parallel)
    saved, widest = 0.0, 0.0
    for weight in quantized_weights(family_named(shape.architecture), shape, config.lora).values():
        inputs = weight.num_inputs / (layout.tensor_size if weight.is_row_parallel else 1)
        outputs = float(sum(map(weight.num_outputs, weight.modules)))
        outputs /= 1 if weight.is_row_parallel else layout.tensor_size
        saved += inputs * outputs * weight_bytes - bytes_of(outputs, inputs)
        widest = max(widest, inputs * outputs)
    # What the stage with the most layers holds.
    share = -(-shape.num_layers // layout.pipeline_size) / shape.num_layers
    return saved * share, widest


def kept_by_adapters(config: RunConfig, shape: ModelShape, *, is_compiled: bool) -> float:
    """Numbers that the adapters of a layer keep for each token, beside what the layer does.

    Inputs that sequence parallelism has gathered, in place of the rank's share of them. With
    dropout each projection's own, op by op with the places that it dropped, in place of what left a
    norm and of the MLP's product: the base is frozen and keeps neither. What attention gave is kept
    by attention.
    """
    layout, lora, kept = layout_of(config.parallel), config.lora, 0.0
    for name, weight in adapted_weights(family_named(shape.architecture), shape, lora).items():
        inputs = weight.num_inputs / (layout.tensor_size if weight.is_row_parallel else 1)
        is_gathered = layout.sequence_parallel and not weight.is_row_parallel
        is_of_attention = name.endswith("self_attention.linear_proj.weight")
        if is_gathered or (lora.dropout and not is_of_attention):
            kept -= inputs / (layout.tensor_size if is_gathered else 1)
        if lora.dropout:
            kept += (1.0 if is_compiled else 1.5) * inputs * len(weight.modules)
        elif is_gathered:
            kept += inputs
    return kept / shape.num_layers
