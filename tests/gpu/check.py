"""What only a GPU can show, floors 0 to 2 alone: `make test-gpu` (torchrun, one process).

Checks every attention kernel that is installed against torch's SDPA, the engine against
transformers in fp32, bf16 against fp32, a checkpoint's way back to transformers, that nothing of
ours waits for the device within a step, and compiled code against plain; then measures tokens per
second, model FLOPs utilisation and memory. Prints a line for each and ends with 1 if any failed.
`--device cpu` runs what a CPU can, to try the script itself.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from roll_sft.base.layout import ParallelLayout
from roll_sft.base.metrics import flops_per_step, peak_flops
from roll_sft.config.build import build_config
from roll_sft.config.schema import RunConfig, layout_of
from roll_sft.data.steps.packing import CostModel
from roll_sft.data.steps.plan import Planner, PlanOptions
from roll_sft.data.tokens.cache import TokenData
from roll_sft.engine import attention_kernels
from roll_sft.engine.engine import Engine
from roll_sft.engine.environment import set_variables
from roll_sft.engine.micro_batch import segments_of
from roll_sft.engine.process_groups import Rendezvous, process_groups
from roll_sft.job.in_process import prepare_job
from roll_sft.models.random_weights import RandomSource
from roll_sft.models.source import ModelSource, family_of
from tests import parity, waits
from tests.gpu.compiled_checks import check_compiled

SHAPES = {  # hidden, ffn, layers, heads, key-value heads; all tied
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2),
}
BACKENDS = ("te", "flash", "varlen", "sdpa")
PACK_TOKENS, PACKS, MEASURED_STEPS = 8192, 4, 5


class SyntheticTokens:
    """Samples of log-normal length with random tokens, half of them supervised."""

    def __init__(self, *, num_samples: int, vocab_size: int, longest: int) -> None:
        generator = np.random.default_rng(0)
        lengths = generator.lognormal(np.log(368), 1.05, num_samples)
        self.lengths = np.clip(lengths, 16, longest).astype(np.int32)
        self.supervised = (self.lengths // 2).astype(np.int32)
        self._vocab_size = vocab_size

    def sample(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        length = int(self.lengths[index])
        generator = np.random.default_rng(index)
        mask = np.zeros(length, np.uint8)
        mask[length - 1 - int(self.supervised[index]) : length - 1] = 1
        return generator.integers(0, self._vocab_size, length, dtype=np.int32), mask


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--no-speed", action="store_true", help="check, do not measure")
    parser.add_argument("--no-compile", action="store_true", help="leave compiled code out")
    options = parser.parse_args()
    set_variables(deterministic=False)
    store, rank, world_size = next(dist.rendezvous("env://"))
    rendezvous = Rendezvous("", 0, rank, world_size, 120.0, 600.0)
    failures = 0
    with (
        process_groups(rendezvous, ParallelLayout(1), device=options.device, store=store),
        tempfile.TemporaryDirectory() as folder,
    ):
        checks = [
            check_kernels(options.device),
            check_engine(options.device, Path(folder)),
            check_waits(options.device, Path(folder)),
        ]
        if not options.no_compile:
            checks.append(check_compiled(options.device, Path(folder)))
        for results in checks:
            for name, value, bound in results:
                holds = value <= bound
                failures += not holds
                print(
                    f"{'ok  ' if holds else 'FAIL'} {name}: {value:.2e} <= {bound:.0e}", flush=True
                )
        if not options.no_speed:
            for line in measure(options.device):
                print(json.dumps(line), flush=True)
    return 1 if failures else 0


def available(device: str) -> list[str]:
    if device == "cpu":
        return ["sdpa"]
    where, heads = torch.device(torch.cuda.current_device()), attention_kernels.Heads(8, 2, 64)
    found = {
        name: attention_kernels.why_not(
            getattr(attention_kernels, name), where, torch.bfloat16, heads
        )
        for name in BACKENDS
    }
    for name, reason in found.items():
        if reason is not None:
            sys.stdout.write(f"not checked: {name} ({reason})\n")
    return [name for name, reason in found.items() if reason is None]


def check_kernels(device: str) -> Iterator[tuple[str, float, float]]:
    """Output and gradients of each kernel against SDPA in fp32, one and two context ranks."""
    where = torch.device(torch.cuda.current_device())
    bounds = torch.tensor([0, 512, 768, 2048], dtype=torch.int32)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for context_size in (1, 2):
        segments = segments_of(bounds, context_size=context_size, context_rank=0)
        segments = segments.moved(lambda tensor: tensor.to(where))
        sizes = (sum(segments.query_lengths), sum(segments.key_lengths), sum(segments.key_lengths))
        torch.manual_seed(1)
        inputs = [
            torch.randn(size, heads, 64, device=where, dtype=dtype)
            for size, heads in zip(sizes, (8, 2, 2), strict=True)
        ]
        reference = _outputs(attention_kernels.sdpa, [x.float() for x in inputs], segments)
        for name in available(device):
            results = _outputs(getattr(attention_kernels, name), inputs, segments)
            worst = max(
                float((a.float() - b).abs().max() / b.abs().max())
                for a, b in zip(results, reference, strict=True)
            )
            yield f"kernel {name} against fp32 SDPA, {context_size} context rank(s)", worst, 2e-2


def _outputs(
    kernel: Callable[..., torch.Tensor], inputs: list[torch.Tensor], segments: Any
) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = kernel(*leaves, segments)
    output.float().square().sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def check_engine(device: str, folder: Path) -> Iterator[tuple[str, float, float]]:
    """Eight steps against transformers in fp32, bf16 against fp32, and the exported model."""
    parity.write_model(folder / "model")
    parity.write_rows(folder / "rows.jsonl")
    config = parity.parity_config(folder, parallel={"device": device})
    job = prepare_job(config)
    wanted, logits = parity.reference_run(job)
    staging = folder / "checkpoints" / ".staging_00000008"
    staging.mkdir(parents=True)
    steps = parity.engine_run(config, staging) or []
    for key, bound in (("loss", 1e-5), ("grad_norm", 1e-4)):
        worst = max(abs(a[key] / b[key] - 1) for a, b in zip(steps, wanted, strict=True))
        yield f"fp32 {key} against transformers", worst, bound
    model = parity.export_run(job, staging, folder / "hf")
    worst = float((parity.model_logits(model) - logits).abs().max() / logits.abs().max())
    yield "exported logits", worst, 1e-4
    for name in available(device):
        chosen = {"dtype": "bf16", "attention_backend": name}
        half = parity.parity_config(folder, model=chosen, parallel={"device": device})
        losses = parity.engine_run(half, None) or []
        worst = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(losses, steps, strict=True))
        yield f"bf16 loss with {name} against fp32", worst, 1e-2


def check_waits(device: str, folder: Path) -> Iterator[tuple[str, float, float]]:
    """Waits for the device that are ours, before a step's end; Megatron's are listed alone.

    `folder` is that of `check_engine`.
    """
    config = parity.parity_config(folder, model={"dtype": "bf16"}, parallel={"device": device})
    job = prepare_job(config)
    engine = Engine(config, source=job.source, data=job.data)
    work = [job.planner.step(step).work_for(0, learning_rate=1e-5) for step in (1, 2, 3)]
    for first in work[:2]:  # kernels are compiled, and states made
        engine.train_step(first)
    engine._ahead.begin(work[2].micro_batches)
    with waits.recorded(device) as found:
        engine.train_step(work[2])
    within = [wait for wait in found if not wait.is_end_of_step]
    for text, count in Counter(map(str, within)).items():
        print(f"     {count} x {text}", flush=True)
    yield "waits of ours within a step", sum(wait.is_ours for wait in within), 0


def measure(device: str) -> Iterator[dict[str, Any]]:
    """Speed and memory of each shape with each kernel, packed log-normal data, bf16."""
    from transformers import Qwen2Config

    name_of_device = torch.cuda.get_device_name() if device == "cuda" else None
    for name, numbers in SHAPES.items():
        hidden, ffn, layers, heads, groups = numbers
        config = Qwen2Config(
            vocab_size=151936,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
            architectures=["Qwen2ForCausalLM"],
        )
        family = family_of(config)
        shape = family.shape(config)
        tokens = SyntheticTokens(num_samples=4000, vocab_size=shape.vocab_size, longest=PACK_TOKENS)
        weights = RandomSource(family.hf_shapes(shape), seed=1, initializer_range=0.02)
        for backend in available(device):
            run = _speed_config(backend, device)
            data: Any = TokenData(tokens, {})  # type: ignore[arg-type]
            engine = Engine(run, source=ModelSource(shape, opened=weights), data=data)
            plans = Planner(
                tokens.lengths,
                tokens.supervised,
                options=PlanOptions(
                    seed=0,
                    global_batch_size=PACKS * PACK_TOKENS // 560,
                    shuffle=True,
                    packing=True,
                    micro_batch_tokens=PACK_TOKENS,
                    layout=layout_of(run.parallel),
                    cost=CostModel.of(
                        shape.num_matmul_parameters,
                        num_layers=shape.num_layers,
                        attention_width=shape.attention_width,
                    ),
                ),
            )
            seconds, count, flops, memory = 0.0, 0, 0.0, 0.0
            for step in range(1, MEASURED_STEPS + 4):
                plan = plans.step(step)
                metrics = engine.train_step(plan.work_for(0, learning_rate=1e-5))
                assert metrics is not None, "one rank reports"
                if step > 3:  # the first ones warm up
                    seconds += metrics.step_time_s
                    count += plan.total_tokens
                    memory = metrics.peak_memory_gib
                    flops += flops_per_step(
                        num_matmul_parameters=shape.num_matmul_parameters,
                        num_layers=shape.num_layers,
                        attention_width=shape.attention_width,
                        lengths=tokens.lengths[list(plan.sample_ids)].tolist(),
                    )
            peak = peak_flops(name_of_device)
            yield {
                "shape": name,
                "backend": backend,
                "device": name_of_device,
                "tokens_per_s": round(count / seconds),
                "mfu_of_datasheet_peak": round(flops / seconds / peak, 3) if peak else None,
                "memory_gib": round(memory, 1),
                "torch": torch.__version__,
            }
            del engine
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


def _speed_config(backend: str, device: str) -> RunConfig:
    return build_config(
        {
            "model": {"dtype": "bf16", "attention_backend": backend},
            "parallel": {"device": device},
            "train": {"recompute": "selective" if backend == "sdpa" else "none"},
        }
    )


if __name__ == "__main__":
    sys.exit(main())
