"""What adapters cost: a step beside full fine-tuning and beside PEFT, bytes, and a merge.

    python benchmarks/lora.py [--pairs N] [--only step,peft,bytes,merge]

Steps: layers of Qwen2.5-0.5B's shape, two of them, fp32, one thread, rank 16 on all projections;
CPU time of whole optimizer steps. Full fine-tuning is ours on the same packs; PEFT runs
transformers in a bare loop on our packs. Bytes are counted: adapters, gradient buffers and
optimizer, and a base in NF4. The merge is of a bf16 model of eight such layers and Qwen's
vocabulary, and ends with its bytes on disk, as the copy does. Pairs are interleaved.
"""

import argparse
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conversion import _copied, _write_model
from cpu_throughput import bare_steps, our_steps
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from shared import chat_data, measures
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from roll_sft.convert.merge_lora import merge
from roll_sft.job.in_process import prepare_job
from roll_sft.job.job import Job
from roll_sft.job.lora import base_shape
from roll_sft.models.adapters.adapter import adapter_shapes, num_trained_by
from roll_sft.models.adapters.peft_folder import CONFIG, WEIGHTS, config_of
from roll_sft.models.files.json_files import write_json
from roll_sft.run import compose

RANK, LENGTH, ROWS = 16, 512, 400
STEP_TOKENS, VOCAB, LAYERS = 2 * LENGTH, 12_800, 2
STEPS = 1
PACKAGES = ("torch", "megatron-core", "transformers", "peft")


def main() -> None:
    """Measures and prints one line for each measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=measures.pairs(5))
    parser.add_argument("--only", default="step,peft,bytes,merge")
    options = parser.parse_args()
    only = options.only.split(",")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if {"step", "peft", "bytes"} & set(only):
            write_model(folder)
            _measure_steps(folder, only, pairs=options.pairs)
        if "merge" in only:
            _measure_merge(folder, pairs=options.pairs)


def _measure_steps(folder: Path, only: list[str], *, pairs: int) -> None:
    with engines(folder) as (full, lora, job):
        if "bytes" in only:
            _show_bytes(lora, job)
            _show_quantized_bytes(job)
        runs = {"lora": our_steps(lora, job)}
        if "step" in only:
            runs["full"] = our_steps(full, job)
        if "peft" in only:
            runs["peft"] = bare_steps(_peft_model(folder), job)
        rates: dict[str, list[float]] = {name: [] for name in runs}  # tokens per CPU second
        for run in runs.values():
            run(range(1, 2))
        for pair in range(pairs):
            first = 2 + pair * STEPS
            for name, run in runs.items():
                rates[name].append(run(range(first, first + STEPS)))
    if "step" in only:
        measures.show(
            "lora_step_over_full",
            [full / lora for full, lora in zip(rates["full"], rates["lora"], strict=True)],
            goal="<= 0.7",
            denominator="our step of the whole model on the same packs",
            packages=PACKAGES,
        )
    if "peft" in only:
        measures.show(
            "lora_over_peft",
            [lora / peft for lora, peft in zip(rates["lora"], rates["peft"], strict=True)],
            goal=">= 1.2",
            denominator="PEFT + transformers + AdamW on the same packs",
            packages=PACKAGES,
        )


def _show_bytes(engine: Any, job: Job) -> None:
    """Bytes of what is trained, over 16 for each number: weight, gradient and two moments."""
    from roll_sft.engine.optimizer import inner_optimizers, make_optimizer_state

    make_optimizer_state(engine.optimizer, step=0)
    weights = [p for chunk in engine.chunks for p in chunk.parameters() if p.requires_grad]
    buffers = [buffer.grad_data for chunk in engine._wrapped for buffer in chunk.buffers]
    moments = [
        value
        for inner in inner_optimizers(engine.optimizer)
        for values in inner.optimizer.state.values()
        for value in values.values()
    ]
    found = sum(tensor.nbytes for tensor in (*weights, *buffers, *moments))
    formula = 16 * num_trained_by(job.config.lora, job.source.shape)
    measures.show(
        "lora_bytes",
        [found / formula],
        goal="<= 1.02",
        denominator="16 bytes for each trained number",
        packages=PACKAGES,
    )


def _show_quantized_bytes(job: Job) -> None:
    """Bytes of the layers' projections in NF4, over those in bf16."""
    from roll_sft.models.adapters.nf4 import quantized_part, quantized_weights

    lora = replace(job.config.lora, quantize_base="nf4")
    source, found, in_bf16 = job.source.tensors, 0, 0
    for weight in quantized_weights(job.source.family, job.source.shape, lora).values():
        like = torch.empty((), dtype=torch.bfloat16)
        part = quantized_part(weight, source, like=like, tensor_rank=0, tensor_size=1)
        found += part.num_bytes
        in_bf16 += 2 * math.prod(part.shape)
    measures.show(
        "nf4_bytes_over_bf16",
        [found / in_bf16],
        goal="<= 0.30",
        denominator="the same projections in bf16",
        packages=(*PACKAGES, "bitsandbytes"),
    )


def _peft_model(folder: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def write_model(folder: Path) -> None:
    """The model, the tokenizer and the rows in `folder`."""
    chat_data.write(folder, num_rows=ROWS)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tok")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=max(VOCAB, len(tokenizer)),
            hidden_size=896,
            num_hidden_layers=LAYERS,
            num_attention_heads=14,
            num_key_value_heads=2,
            intermediate_size=4864,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(str(folder / "model"))


@contextmanager
def engines(folder: Path) -> Iterator[tuple[Any, Any, Job]]:
    """Our engine of the whole model, that of adapters, and the job of the latter."""
    composed = compose(
        [
            "--config-name=demo",
            f"model.path={folder}/model",
            "model.random_init=false",
            f"data.train=[{{path: {folder}/rows.jsonl}}]",
            "data.validation=[]",
            f"data.sequence_length={LENGTH}",
            "data.overlong=truncate",
            f"data.cache_dir={folder}/cache",
            f"train.global_batch_tokens={STEP_TOKENS}",
            f"train.micro_batch_tokens={LENGTH}",
            "parallel.num_workers=1",
            "parallel.tensor_model_parallel_size=1",
            "parallel.sequence_parallel=false",
            f"lora.rank={RANK}",
        ]
    )
    assert composed is not None
    job = prepare_job(composed[0])
    from roll_sft.engine.engine import Engine
    from roll_sft.engine.process_groups import Rendezvous, process_groups

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 1)
    rendezvous = Rendezvous(0, 0, 1, 60.0, 60.0)
    whole = replace(job.config, lora=replace(job.config.lora, rank=0))
    with process_groups(rendezvous, job.layout, device="cpu", store=store):
        full, lora = (
            Engine(config, source=job.source, data=job.data) for config in (whole, job.config)
        )
        yield full, lora, job


def _measure_merge(folder: Path, *, pairs: int) -> None:
    """A merge beside a copy of the base's folder."""
    base, adapter, output = folder / "base", folder / "adapter", folder / "merged"
    _write_model(base, measures.size(8, quick=2))
    _write_adapter(adapter, base)
    merge(adapter, base, output)
    ratios = []
    for _ in range(pairs):
        copy_s = _copied(base, output)
        shutil.rmtree(output)  # neither is timed with the end of an earlier output
        os.sync()
        started = time.perf_counter()
        merge(adapter, base, output)
        ratios.append(copy_s / (time.perf_counter() - started))
    measures.show(
        "merge_over_copy",
        ratios,
        goal=">= 0.6",
        denominator="a copy of the base's files, on disk when it ends",
        packages=PACKAGES,
    )


def _write_adapter(folder: Path, base: Path) -> None:
    """An adapter of random numbers for all projections of the model in `base`."""
    from roll_sft.config.lora import LoraConfig as Section

    folder.mkdir()
    lora = Section(rank=RANK)
    shapes = adapter_shapes(*base_shape(base), lora)
    save_file({name: 0.01 * torch.randn(shape) for name, shape in shapes.items()}, folder / WEIGHTS)
    write_json(folder / CONFIG, config_of(lora, targets=["q_proj"], base=str(base)))


if __name__ == "__main__":
    main()
