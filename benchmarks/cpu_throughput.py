"""Training on a CPU, in tokens per CPU second, beside a bare transformers loop and beside TRL.

    python benchmarks/cpu_throughput.py [--trl /path/to/python]   # an interpreter that has trl

A Qwen2 of 5M parameters in fp32, one thread, one optimizer step for each pack of at most 2,048
tokens, losses on answers alone. The bare loop runs transformers on our packs, with the positions
that tell it where a sample begins, and torch's AdamW; TRL prepares and packs the same rows itself,
and its start is not counted. Blocks of steps are interleaved.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from shared import chat_data, measures
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from roll_sft.job.in_process import prepare_job
from roll_sft.job.job import Job
from roll_sft.run import compose

LENGTH, ROWS, STEPS, WARM_UP = 2048, 600, measures.size(6, quick=2), 2
PACKAGES = ("torch", "megatron-core", "transformers")


def main() -> None:
    """Measures and prints one line for each denominator."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--trl", help="an interpreter that has trl", default=os.environ.get("TRL_PYTHON")
    )
    parser.add_argument("--pairs", type=int, default=measures.pairs(5))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder)
        with engine_of(folder) as (engine, job):
            model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
            ours, bare = our_steps(engine, job), bare_steps(model, job)
            ours(range(1, 1 + WARM_UP))
            bare(range(1, 1 + WARM_UP))
            blocks = [
                range(first, first + STEPS)
                for first in range(1 + WARM_UP, 1 + WARM_UP + STEPS * options.pairs, STEPS)
            ]
            pairs = [(ours(steps), bare(steps)) for steps in blocks]
            _show("train_over_bare_transformers", pairs, goal=">= 0.95", of="transformers + AdamW")
            if options.trl is None:
                print(
                    "train_over_trl: left out, neither --trl nor TRL_PYTHON is given",
                    file=sys.stderr,
                )
                return
            pairs = [(ours(steps), _trl(options.trl, folder)) for steps in blocks]
            _show("train_over_trl", pairs, goal=">= 1.4", of="TRL's SFTTrainer with packing")


def _show(name: str, pairs: list[tuple[float, float]], *, goal: str, of: str) -> None:
    ratios = [ours / theirs for ours, theirs in pairs]
    measures.show(name, ratios, goal=goal, denominator=of, packages=PACKAGES)


def our_steps(engine: Any, job: Job) -> Callable[[range], float]:
    """Tokens per CPU second of our optimizer steps."""

    def run(steps: range) -> float:
        plans = [job.planner.step(step) for step in (*steps, steps[-1] + 1)]
        works = [
            plan.work_for(0, learning_rate=1e-4, following=following)
            for plan, following in itertools.pairwise(plans)
        ]
        started = time.process_time()
        for work in works:
            engine.train_step(work)
        seconds = time.process_time() - started
        return sum(plan.total_tokens for plan in plans[:-1]) / seconds

    return run


def bare_steps(model: Any, job: Job) -> Callable[[range], float]:
    """Tokens per CPU second of transformers on the same packs, which are built beforehand."""
    model.train()
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def run(steps: range) -> float:
        packs = [_packs(job, step) for step in steps]
        tokens, started = 0, time.process_time()
        for inputs in packs:
            supervised = sum(int((pack["labels"] >= 0).sum()) for pack in inputs)
            for pack in inputs:
                tokens += pack["input_ids"].numel()
                with torch._C.DisableTorchFunction():  # the mode of `cpu_backend` would slow it
                    (model(**pack, num_items_in_batch=supervised, use_cache=False).loss).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return tokens / (time.process_time() - started)

    return run


def _packs(job: Job, step: int) -> list[dict[str, torch.Tensor]]:
    """The packs of a step as transformers takes them."""
    packs = []
    for ids in job.planner.step(step).ranks[0]:
        samples = [job.data.train.sample(index) for index in ids]
        tokens = [torch.from_numpy(tokens.astype("int64")) for tokens, _ in samples]
        labels = []
        for sample, (_, mask) in zip(tokens, samples, strict=True):
            # transformers shifts: label t stands at the token itself.
            own = sample.clone()
            own[0] = -100
            own[1:][torch.from_numpy(mask[:-1]) == 0] = -100
            labels.append(own)
        packs.append(
            {
                "input_ids": torch.cat(tokens)[None],
                "labels": torch.cat(labels)[None],
                "position_ids": torch.cat([torch.arange(len(each)) for each in tokens])[None],
            }
        )
    return packs


def _trl(python: str, folder: Path) -> float:
    program = Path(__file__).parent / "shared" / "trl_train.py"
    result = subprocess.run(
        [python, str(program), str(folder), str(LENGTH), str(STEPS)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    measured = json.loads(result.stdout.strip().splitlines()[-1])
    return float(measured["tokens"] / measured["cpu_s"])


def write_model(folder: Path) -> None:
    """The model, the tokenizer and the rows in `folder`."""
    chat_data.write(folder, num_rows=ROWS)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tok")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=704,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(str(folder / "model"))


@contextmanager
def engine_of(folder: Path, *given: str) -> Iterator[tuple[Any, Job]]:
    """The engine of a run on what `write_model` made, with the overrides `given`."""
    composed = compose(
        [
            "--config-name=demo",
            f"model.path={folder}/model",
            f"data.train=[{{path: {folder}/rows.jsonl}}]",
            "data.validation=[]",
            f"data.sequence_length={LENGTH}",
            "data.overlong=truncate",
            f"data.cache_dir={folder}/cache",
            f"train.global_batch_tokens={LENGTH}",
            f"train.micro_batch_tokens={LENGTH}",
            "train.max_grad_norm=1.0",
            "parallel.num_workers=1",
            "parallel.tensor_model_parallel_size=1",
            "parallel.sequence_parallel=false",
            *given,
        ]
    )
    assert composed is not None
    job = prepare_job(composed[0])
    from roll_sft.engine.engine import Engine
    from roll_sft.engine.process_groups import Rendezvous, process_groups

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 1)
    rendezvous = Rendezvous(0, 0, 1, 60.0, 60.0)
    with process_groups(rendezvous, job.layout, device="cpu", store=store):
        yield Engine(job.config, source=job.source, data=job.data), job


if __name__ == "__main__":
    main()
