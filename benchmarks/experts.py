"""Models with experts on a CPU, beside a bare transformers loop and a bare Megatron-Core loop.

    python benchmarks/experts.py

Small Qwen3-MoE and Mixtral models in fp32, one thread, one rank, on the same packs. Tokens per CPU
second over transformers' with its own choice for experts: without the auxiliary loss, and with it,
where transformers makes it of each pack and we of the global batch, by a forward pass more. A step
over Megatron's schedule and optimizer on the same model, without the auxiliary loss.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import trainer_overhead
from cpu_throughput import PACKAGES, ROWS, WARM_UP, bare_steps, engine_of, our_steps
from shared import chat_data, measures
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

PAIRS, STEPS = measures.pairs(5), measures.size(3, quick=2)


def main() -> None:
    """Measures and prints a line for each model and denominator."""
    torch.set_num_threads(1)
    for kind in ("qwen3_moe", "mixtral"):
        with tempfile.TemporaryDirectory() as name:
            write_model(Path(name), kind)
            for coefficient in (0.0, 0.001):
                over_transformers(Path(name), kind, coefficient)
            over_megatron(Path(name), kind)


def over_transformers(folder: Path, kind: str, coefficient: float) -> None:
    """Tokens per CPU second over transformers, with `coefficient` of the auxiliary loss."""
    with engine_of(folder, f"moe.aux_loss_coef={coefficient}") as (engine, job):
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        model.config.output_router_logits = coefficient > 0
        model.router_aux_loss_coef = coefficient
        ours, bare = our_steps(engine, job), bare_steps(model, job)
        ratios = []
        for pair in range(-1, PAIRS):
            first = 1 if pair < 0 else 1 + WARM_UP + pair * STEPS
            steps = range(first, first + (WARM_UP if pair < 0 else STEPS))
            ratios.append(ours(steps) / bare(steps))
    with_loss = "_with_aux_loss" if coefficient else ""
    measures.show(
        f"{kind}_over_transformers{with_loss}",
        ratios[1:],  # the first warms up
        goal=">= 0.6" if coefficient else ">= 0.95",
        denominator="transformers + AdamW",
        packages=PACKAGES,
    )


def over_megatron(folder: Path, kind: str) -> None:
    """CPU seconds of our step over those of Megatron's schedule and optimizer."""
    with engine_of(folder, "moe.aux_loss_coef=0") as (engine, job):
        ours = trainer_overhead.our_steps(engine, job, STEPS)
        bare = trainer_overhead.bare_steps(engine, job, STEPS)
        ours()
        bare()
        ratios = []
        for pair in range(PAIRS):
            order = (ours, bare) if pair % 2 else (bare, ours)
            seconds = {run: _cpu_seconds(run) for run in order}
            ratios.append(seconds[ours] / seconds[bare])
    measures.show(
        f"{kind}_over_megatron",
        ratios,
        goal="<= 1.03",
        denominator="Megatron's schedule and optimizer on the same packs, built beforehand",
        packages=PACKAGES,
    )


def _cpu_seconds(run: Any) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def write_model(folder: Path, kind: str) -> None:
    """The model, the tokenizer and the rows in `folder`."""
    chat_data.write(folder, num_rows=ROWS)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tok")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(kind, len(tokenizer)))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(str(folder / "model"))


def config_of(kind: str, vocab_size: int) -> PreTrainedConfig:
    """Of eight experts, of which two take a token."""
    shared: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "num_experts_per_tok": 2,
    }
    if kind == "mixtral":
        return MixtralConfig(
            **shared, num_local_experts=8, intermediate_size=352, sliding_window=None
        )
    return Qwen3MoeConfig(
        **shared, head_dim=64, num_experts=8, moe_intermediate_size=352, norm_topk_prob=True
    )


if __name__ == "__main__":
    main()
