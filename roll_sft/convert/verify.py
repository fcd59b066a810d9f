"""Whether a HuggingFace folder and a checkpoint are one model: the logits of both, side by side.

One process, on the CPU, in fp32 on equally rounded weights, one model in memory at a time.
transformers computes the folder, megatron-core's GPTModel the checkpoint, each from the names of
its own side, so a tensor in the wrong place shows, and so do rotary embeddings, norms and heads.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from roll_sft.base.errors import CheckpointError
from roll_sft.base.layout import ParallelLayout
from roll_sft.checkpoint.reader import Reader
from roll_sft.config.schema import RunConfig, on_device
from roll_sft.models.files.config_file import load_hf_config
from roll_sft.models.shape import ModelShape
from roll_sft.models.source import family_of

if TYPE_CHECKING:
    from roll_sft.convert.frozen import WholeModel

# Of the largest logit, at LAYERS layers; rounding adds up over layers. Seen: 1e-6 at 4 layers.
TOLERANCE, LAYERS = 1e-5, 4
SPREAD_TOKENS = 64
TEXT = (
    "What is 17 * 23? Think step by step: 17 * 20 = 340 and 17 * 3 = 51, so the answer is 391.\n"
    "def area(radius: float) -> float:\n    return 3.14159 * radius**2\n"
    "Der schnelle braune Fuchs; le renard brun; \u654f\u6377\u7684\u68d5\u8272\u72d0\u72f8."
)


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest difference of `num_logits` logits, over the largest logit, and its bound."""

    num_logits: int
    largest: float
    tolerance: float

    def __str__(self) -> str:
        return (
            f"verify: {self.num_logits} logits of both models differ by {self.largest:.1e} of the"
            f" largest one at most; {self.tolerance:.1e} is allowed"
        )


def verify(
    model: Path,
    checkpoint: Path,
    *,
    dtype: torch.dtype | None,
    reader: "Reader | WholeModel | None" = None,
) -> Difference:
    """Compare the HuggingFace folder `model` with `checkpoint`, the weights of both in `dtype`.

    None leaves them as they are stored. `reader` reads the parameters of `checkpoint`, if a part of
    them is elsewhere. Raises `CheckpointError` where they differ by more than
    rounding. Lets Megatron-Core run without CUDA, which a process cannot take back.
    """
    config = load_hf_config(str(model), trust_remote_code=False)
    shape = family_of(config).shape(config)
    samples = _samples(model, shape)
    expected = _logits_of_transformers(model, samples, dtype=dtype)
    found = _logits_of_megatron(reader or Reader(checkpoint), shape, samples=samples, dtype=dtype)
    difference = Difference(
        num_logits=expected.numel(),
        largest=float((expected - found).abs().max() / expected.abs().max()),
        tolerance=TOLERANCE * max(1.0, math.sqrt(shape.num_layers / LAYERS)),
    )
    if not difference.largest <= difference.tolerance:
        raise CheckpointError(f"{difference}; {model} and {checkpoint} are not one model")
    return difference


def _samples(model: Path, shape: ModelShape) -> list[torch.Tensor]:
    """Token ids int64 [T]: of a text, if there is a tokenizer, and ids of the whole vocabulary."""
    from transformers import AutoTokenizer  # slow to import

    longest = min(shape.max_position_embeddings, shape.vocab_size)
    spread = torch.linspace(0, shape.vocab_size - 1, min(SPREAD_TOKENS, longest)).round().long()
    samples = [spread[torch.randperm(len(spread), generator=torch.Generator().manual_seed(0))]]
    if (model / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(
            model, local_files_only=True, trust_remote_code=False
        )
        samples.append(torch.tensor(tokenizer(TEXT)["input_ids"][:longest]))
    return [ids for ids in samples if len(ids)]


def _logits_of_transformers(
    model: Path, samples: list[torch.Tensor], *, dtype: torch.dtype | None
) -> torch.Tensor:
    """Logits float32 [T of all samples, V], each sample by itself."""
    from transformers import AutoModelForCausalLM

    built: Any = AutoModelForCausalLM.from_pretrained(
        model,
        local_files_only=True,
        trust_remote_code=False,
        attn_implementation="eager",
        dtype=torch.float32,
    )
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(parameter.to(dtype or parameter.dtype))
        return torch.cat([built(ids[None], use_cache=False).logits[0] for ids in samples])


def _logits_of_megatron(
    reader: "Reader | WholeModel",
    shape: ModelShape,
    *,
    samples: list[torch.Tensor],
    dtype: torch.dtype | None,
) -> torch.Tensor:
    """Logits float32 [T of all samples, V], all in one pack."""
    # Late, so that a conversion needs no Megatron-Core.
    import torch.distributed as dist

    from roll_sft.engine.environment import silence_warnings

    silence_warnings()
    from roll_sft.engine import build
    from roll_sft.engine.attention import describe_pack
    from roll_sft.engine.attention_kernels import sdpa
    from roll_sft.engine.micro_batch import segments_of
    from roll_sft.engine.process_groups import Rendezvous, process_groups

    layout = ParallelLayout(1)
    alone = Rendezvous(0, 0, 1, setup_timeout_s=60.0, collective_timeout_s=60.0)
    with (
        process_groups(alone, layout, device="cpu", store=dist.HashStore()),
        torch.no_grad(),
    ):
        transformer = build.transformer_config(shape, layout, config=on_device(RunConfig(), "cpu"))
        chunks = build.build_model(shape, transformer, kernel=sdpa)
        for name, parameter in build.named_parameters(chunks):
            rows = parameter.shape[0]  # the stored vocabulary may be padded
            value = reader.read(name)[:rows]
            parameter.copy_(value.to(dtype or value.dtype))
        lengths = torch.tensor([len(ids) for ids in samples])
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        positions = torch.cat([torch.arange(len(ids)) for ids in samples])[None]
        logits: torch.Tensor = chunks[0].eval()(
            torch.cat(samples)[None],
            positions,
            None,
            packed_seq_params=describe_pack(
                segments_of(bounds, context_size=1, context_rank=0),
                positions,
                frequencies=build.rotary_frequencies(shape),
            ),
        )
    if shape.variation is None:
        return logits[0]
    from roll_sft.engine.variations.logits import changed_logits

    return changed_logits(logits[0], shape.variation.logits_divisor, shape.variation.logits_softcap)
