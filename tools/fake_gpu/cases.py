"""What is checked: shapes of Qwen2.5 on layouts, as one of the layout's ranks."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from transformers import Qwen2Config

from benchmarks.gpu.models import SHAPES
from roll_sft.config.build import build_config
from roll_sft.config.schema import RunConfig, layout_of

PACK_TOKENS = 8192
# Degrees of tensor, pipeline, context and data parallelism, and the ranks to be.
LAYOUTS = {
    "TP1": ((1, 1, 1, 1), (0,)),
    "DP8": ((1, 1, 1, 8), (0,)),
    "TP2 CP2 DP2": ((2, 1, 2, 2), (0,)),
    "TP2 PP2 CP2": ((2, 2, 2, 1), (0, 7)),
}
RECOMPUTE = ("none", "full")
# On one GPU, beside these.
PARTS = ("core_attn", "mlp", "core_attn+mlp", "core_attn+mlp+layernorm")


@dataclass(frozen=True, slots=True)
class Case:
    """A model on a layout, as `rank`."""

    shape: str  # such as 7B
    layout: str
    rank: int
    recompute: str = "none"
    is_even: bool = True  # packs of one length, whose every token is trained on
    num_layers: int | None = None  # None: the model's
    has_adapters: bool = False  # of every linear layer
    dropout: float = 0.0

    @property
    def name(self) -> str:
        """For a line of the table."""
        rank = f" rank {self.rank}" if self.rank else ""
        packs = "" if self.is_even else ", unequal packs"
        adapters = ", adapters" if self.has_adapters else ""
        adapters += " with dropout" if self.dropout else ""
        return f"{self.shape} {self.layout}{rank}, recompute {self.recompute}{packs}{adapters}"

    @property
    def degrees(self) -> tuple[int, int, int, int]:
        """Of tensor, pipeline, context and data parallelism."""
        return LAYOUTS[self.layout][0]

    @property
    def stage(self) -> int:
        """The pipeline stage of the rank."""
        return layout_of(self.config().parallel).coordinate(self.rank).pipeline_rank

    @property
    def samples_per_step(self) -> int:
        """One a pack: as many packs as fill a pipeline, and one more."""
        return (self.degrees[1] + 1) * self.degrees[3]

    def config(self) -> RunConfig:
        """The run."""
        tensor, pipeline, context, data = self.degrees
        return build_config(
            {
                "model": {"dtype": "bf16"},
                "parallel": {
                    "device": "cuda",
                    "num_workers": tensor * pipeline * context * data,
                    "tensor_model_parallel_size": tensor,
                    "pipeline_model_parallel_size": pipeline,
                    "context_parallel_size": context,
                    "sequence_parallel": tensor > 1,
                },
                "data": {"sequence_length": PACK_TOKENS},
                "lora": {"rank": 16, "dropout": self.dropout} if self.has_adapters else {},
                "train": {
                    "micro_batch_tokens": PACK_TOKENS,
                    "recompute": self.recompute.split("+")
                    if self.recompute not in RECOMPUTE
                    else self.recompute,
                },
            }
        )

    def model(self) -> Qwen2Config:
        """The model."""
        hidden, ffn, layers, heads, groups, tied, _ = SHAPES[f"Qwen2.5-{self.shape}"]
        return Qwen2Config(
            vocab_size=151_936,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=self.num_layers or layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            max_position_embeddings=32_768,
            tie_word_embeddings=tied,
            architectures=["Qwen2ForCausalLM"],
        )

    def one_layer(self) -> "Case":
        """The same with one layer on each pipeline stage."""
        return replace(self, num_layers=self.degrees[1])


class Tokens:
    """Samples whose token ids are all one; of each the last `supervised` can be trained on."""

    weights = None  # all count the same

    def __init__(self, case: Case) -> None:
        if case.is_even:
            self.lengths = np.full(64, PACK_TOKENS, np.int32)
            self.supervised = self.lengths - 1
        else:
            # One sample a pack, and too different for short packs to be filled up.
            self.lengths = np.linspace(0.55, 1.0, 64, dtype=np.float32) * PACK_TOKENS
            self.lengths = self.lengths.astype(np.int32)
            self.supervised = self.lengths // 2

    def sample(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Token ids and label mask of sample `index`."""
        length, count = int(self.lengths[index]), int(self.supervised[index])
        mask = np.zeros(length, np.uint8)
        mask[length - 1 - count : length - 1] = 1
        return np.ones(length, np.int32), mask


def all_cases() -> list[Case]:
    """Every shape on every layout; pipelines also with packs of all lengths; some with adapters."""
    adapted = [
        Case("1.5B", layout, 0, has_adapters=True, dropout=dropout)
        for layout in ("TP1", "TP2 CP2 DP2")
        for dropout in (0.0, 0.05)
    ]
    plain = [
        Case(shape, layout, rank, recompute, is_even)
        for shape in ("0.5B", "1.5B", "7B")
        for layout, ((_, pipeline, *_), ranks) in LAYOUTS.items()
        for rank in ranks
        for recompute in (*RECOMPUTE, *(PARTS if layout == "TP1" else ()))
        for is_even in ((True, False) if pipeline > 1 and recompute == "none" else (True,))
    ]
    return plain + adapted
