"""What only a GPU can show, floors 0 to 2 alone: `make test-gpu` (torchrun, one process).

Checks every attention kernel that is installed against torch's SDPA, the engine against
transformers in fp32, bf16 against fp32, a checkpoint's way back to transformers, that nothing of
ours waits for the device within a step, that a run repeats itself and resumes to the bit, compiled
code against plain, adapters against peft, and each family and recipe against the same on a CPU.
Prints a line for each and ends with 1 if any failed.
Speed is `benchmarks/gpu/step.py`'s. `--device cpu` runs what a CPU can, to try the script itself.
"""

import argparse
import importlib.util
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from roll_sft.base.layout import ParallelLayout
from roll_sft.engine import attention_kernels
from roll_sft.engine.attention_packages import PACKAGES
from roll_sft.engine.engine import Engine
from roll_sft.engine.environment import set_variables
from roll_sft.engine.micro_batch import segments_of
from roll_sft.engine.process_groups import Rendezvous, process_groups
from roll_sft.job.in_process import prepare_job
from tests import parity, waits
from tests.gpu.compiled_checks import check_compiled
from tests.gpu.model_checks import check_models
from tests.gpu.repeat_checks import check_repeats

CHECKS = ("kernels", "engine", "waits", "repeats", "compiled", "lora", "models")
KERNELS = {**PACKAGES, "varlen": attention_kernels.varlen, "sdpa": attention_kernels.sdpa}
Results = Iterator[tuple[str, float, float]]  # of each: its name, its value, the largest allowed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--only", nargs="+", metavar="CHECK", choices=CHECKS, help=", ".join(CHECKS)
    )
    options = parser.parse_args()
    set_variables(deterministic=True)  # as some of the runs are
    store, rank, world_size = next(dist.rendezvous("env://"))
    rendezvous = Rendezvous(0, rank, world_size, 120.0, 600.0)
    with (
        process_groups(rendezvous, ParallelLayout(1), device=options.device, store=store),
        tempfile.TemporaryDirectory() as folder,
    ):
        inputs, device = Path(folder), options.device
        checks: dict[str, Callable[[], Results]] = {
            "kernels": lambda: check_kernels(device),
            "engine": lambda: check_engine(device, inputs),
            "waits": lambda: check_waits(device, inputs),
            "repeats": lambda: check_repeats(device, inputs, backends=available(device)),
            "compiled": lambda: check_compiled(device, inputs),
            "lora": lambda: check_lora(device, inputs),
            "models": lambda: check_models(device, inputs),
        }
        write_inputs(inputs)
        failures = sum(_failures(checks[name]) for name in options.only or checks)
    return 1 if failures else 0


def _failures(check: Callable[[], Results]) -> int:
    """Prints each result of `check`; how many do not hold. An error is one, and ends this check."""
    failures = 0
    try:
        for name, value, bound in check():
            holds = value <= bound
            failures += not holds
            print(f"{'ok  ' if holds else 'FAIL'} {name}: {value:.2e} <= {bound:.0e}", flush=True)
    except Exception:  # noqa: BLE001 -- the other checks say more about the machine
        print(f"FAIL {traceback.format_exc()}", flush=True)
        failures += 1
    return failures


def write_inputs(folder: Path) -> None:
    """The model and the rows of all checks that train."""
    parity.write_model(folder / "model")
    parity.write_rows(folder / "rows.jsonl")


def available(device: str) -> list[str]:
    if device == "cpu":
        return ["sdpa"]
    where, heads = torch.device(torch.cuda.current_device()), attention_kernels.Heads(8, 2, 64)
    found = {
        name: attention_kernels.why_not(kernel, where, torch.bfloat16, heads)
        for name, kernel in KERNELS.items()
    }
    for name, reason in found.items():
        if reason is not None:
            sys.stdout.write(f"not checked: {name} ({reason})\n")
    return [name for name, reason in found.items() if reason is None]


def check_kernels(device: str) -> Results:
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
            attention_kernels.use_own_kernels()  # not those of the kernel before
            results = _outputs(KERNELS[name], inputs, segments)
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


def check_engine(device: str, folder: Path) -> Results:
    """Eight steps against transformers in fp32, bf16 against fp32, and the exported model."""
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


def check_waits(device: str, folder: Path) -> Results:
    """Waits for the device that are ours, before a step's end; Megatron's are listed alone.

    `folder` holds what `write_inputs` writes.
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


def check_lora(device: str, folder: Path) -> Results:
    """Ten steps of adapters in fp32 against peft, and beside NF4 also against bitsandbytes.

    `folder` holds what `write_inputs` writes. What is not installed is not checked.
    """
    if importlib.util.find_spec("peft") is None:
        print("not checked: lora (peft is not installed)", flush=True)
        return
    from tests import lora

    shape = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    cases: dict[str, tuple[Path, dict[str, Any]]] = {
        "adapters": (folder, {}),
        "adapters with dropout": (folder, {"dropout": 0.2}),
    }
    if importlib.util.find_spec("bitsandbytes") is None:
        print("not checked: adapters beside NF4 (bitsandbytes is not installed)", flush=True)
    else:
        home = parity.home_of(folder, "qwen2-wide")
        cases["adapters beside NF4"] = home, {"quantize_base": "nf4"}
    for what, (home, options) in cases.items():
        adapter = home / "adapter"
        if not adapter.exists():
            lora.write_adapter(home / "model", adapter, **shape)
        config = lora.lora_config(home, adapter, lora=options, parallel={"device": device})
        job = prepare_job(config)
        if "quantize_base" in options:  # on the device: its codes are not all those of a CPU
            wanted, _, _ = lora.reference_beside_nf4(job, adapter, device=device)
        else:
            wanted, _, _ = lora.reference_run(job, adapter)
        steps = parity.engine_run(config, None) or []
        for key, bound in (("loss", 1e-5), ("grad_norm", 1e-4)):
            yield f"fp32 {key} of {what} against peft", parity.worst(steps, wanted, key), bound


if __name__ == "__main__":
    sys.exit(main())
