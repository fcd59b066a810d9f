"""The section `lora` and the checks of its values that need no model."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from roll_sft.base.text import shown
from roll_sft.config.keys import key

if TYPE_CHECKING:
    from roll_sft.config.schema import RunConfig

ALL_LINEAR = "all-linear"
SAVED_MODULES = ("embed_tokens", "lm_head")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters, which are trained in place of the model's weights."""

    rank: int = key(0, "Rank of the adapters; 0 trains the whole model.", at_least=0, at_most=65536)
    alpha: int = key(
        16,
        "Scales the adapters: by alpha / rank, or by alpha / sqrt(rank) under use_rslora.",
        at_least=1,
    )
    dropout: float = key(
        0.0,
        "Share of an adapter's inputs that each step drops, the same on every layout; below 1.",
        at_least=0,
    )
    target_modules: list[str] = key(
        [ALL_LINEAR],
        "Projections that get an adapter, by their Hugging Face names; all-linear is every one of a"
        " layer.",
    )
    use_rslora: bool = key(False, "Scale by alpha / sqrt(rank), as rank-stabilised LoRA does.")
    modules_to_save: list[str] = key(
        [], "embed_tokens and lm_head: modules to train whole, beside the adapters."
    )
    init: Literal["default", "gaussian"] = key(
        "default",
        "Initial values of A: uniform as torch's linear layers have them, or normal with standard"
        " deviation 1 / rank; B begins at zero.",
    )
    adapter_path: str | None = key(
        None, "PEFT folder to start from; its rank, scale and modules must be those given here."
    )
    quantize_base: Literal["none", "nf4"] = key(
        "none",
        "nf4 holds the weights of the layers' projections in 4 bits with double quantisation, as"
        " QLoRA does; needs bitsandbytes.",
    )


def lora_problems(config: "RunConfig") -> Iterator[str]:
    """What is wrong with `config.lora`, alone and with the other sections."""
    lora, export = config.lora, config.checkpoint.hf_export
    if lora.dropout >= 1:
        yield f"lora.dropout: {lora.dropout} must be below 1"
    stages = config.parallel.pipeline_model_parallel_size
    if lora.dropout and stages > 1 and "mlp" in config.train.recompute:
        # The MLP is computed again when another pack's keys are the last that were seen.
        yield (
            f"lora.dropout: {lora.dropout} on {stages} pipeline stages does not go with mlp in"
            " train.recompute; recompute full or core_attn, or set lora.dropout=0"
        )
    for name in lora.modules_to_save:
        if name not in SAVED_MODULES:
            yield (
                f"lora.modules_to_save: {shown(name)} is not one of {', '.join(SAVED_MODULES)};"
                " train other modules by lora.target_modules"
            )
    if lora.rank:
        if not lora.target_modules:
            yield f"lora.target_modules: empty; name projections, or {ALL_LINEAR}"
        return
    yield from _without_adapters(lora, export)


def _without_adapters(lora: LoraConfig, export: str) -> Iterator[str]:
    """What has no meaning with rank 0."""
    if export in ("adapter", "merged"):
        yield (
            f"checkpoint.hf_export: {export} is of adapters, and lora.rank is 0; set lora.rank, or"
            " checkpoint.hf_export=final"
        )
    if lora.quantize_base != "none":
        yield (
            f"lora.quantize_base: {lora.quantize_base} is of a frozen model, and lora.rank=0 trains"
            " the whole model; set lora.rank, or leave lora.quantize_base out"
        )
    default = LoraConfig(quantize_base=lora.quantize_base)
    for item in fields(lora):
        value = getattr(lora, item.name)
        if value != getattr(default, item.name):
            yield f"lora.{item.name}: {shown(value)} has no effect with lora.rank=0; set lora.rank"
