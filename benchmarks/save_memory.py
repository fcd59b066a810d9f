"""What a save takes of the host's memory at four data ranks, beside what a rank has to write.

    python benchmarks/save_memory.py

Four processes with Megatron's distributed optimizer, each with a quarter of the moments. Memory is
a process's own (RssAnon) at its most during a save, above what it was before. A blocking save
copies nothing; one in the background holds a copy of the rank's own part, and of nobody else's.
"""

import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from shared import chat_data, measures
from transformers import AutoTokenizer, Qwen2Config

from roll_sft.job.in_process import prepare_job
from roll_sft.run import compose

NUM_RANKS = 4


def main() -> None:
    """Measures and prints one line for each kind of save, the worst rank's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_assets(folder)
        prepare_job(_config(folder, is_async=False))  # fills the token cache for all
        context = processes.get_context("spawn")
        results = context.SimpleQueue()
        ranks = [
            context.Process(target=_rank, args=(rank, folder, results)) for rank in range(NUM_RANKS)
        ]
        for rank in ranks:
            rank.start()
        answers = [results.get() for _ in ranks]
        for rank in ranks:
            rank.join()
    for kind in ("blocking", "asynchronous"):
        measures.show(
            f"save_memory_{kind}",
            [answer[kind] for answer in answers],
            goal="<= 0.2" if kind == "blocking" else "<= 1.2",
            denominator="bytes that the rank writes; one value a rank",
            packages=("torch", "megatron-core"),
        )


def _rank(rank: int, folder: Path, results: Any) -> None:
    from roll_sft.engine.engine import Engine
    from roll_sft.engine.process_groups import Rendezvous, process_groups

    torch.set_num_threads(1)
    answer = {}
    for kind in ("blocking", "asynchronous"):
        job = prepare_job(_config(folder, is_async=kind == "asynchronous"))
        store = dist.FileStore(str(folder / f"store_{kind}"), NUM_RANKS)
        rendezvous = Rendezvous(0, rank, NUM_RANKS, 120.0, 120.0)
        with process_groups(rendezvous, job.layout, device="cpu", store=store):
            engine = Engine(job.config, source=job.source, data=job.data)
            engine.train_step(job.planner.step(1).work_for(rank, learning_rate=1e-4))
            staging = folder / kind
            staging.mkdir(exist_ok=True)
            dist.barrier()
            with _Peak() as peak:
                engine.save(staging)
            written = (staging / f"__{rank}_0.distcp").stat().st_size
            answer[kind] = peak.bytes / written
            dist.barrier()
        del engine
    results.put(answer)


class _Peak:
    """The most memory of its own that this process takes in the block, above what it had."""

    def __enter__(self) -> "_Peak":
        self._first = self._most = _own_bytes()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self.bytes = self._most - self._first

    def _watch(self) -> None:
        while not self._is_over.is_set():
            self._most = max(self._most, _own_bytes())
            time.sleep(0.001)


def _own_bytes() -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return (
        int(next(line.split()[1] for line in text.splitlines() if line.startswith("RssAnon"))) << 10
    )


def _write_assets(folder: Path) -> None:
    chat_data.write(folder, num_rows=32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tok")
    Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=2048,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(folder / "model")
    tokenizer.save_pretrained(str(folder / "model"))


def _config(folder: Path, *, is_async: bool) -> Any:
    composed = compose(
        [
            "--config-name=demo",
            f"model.path={folder}/model",
            f"data.train=[{{path: {folder}/rows.jsonl}}]",
            "data.validation=[]",
            "data.sequence_length=256",
            "data.overlong=truncate",
            f"data.cache_dir={folder}/cache",
            "train.global_batch_size=8",
            f"parallel.num_workers={NUM_RANKS}",
            "parallel.tensor_model_parallel_size=1",
            "parallel.sequence_parallel=false",
            "parallel.use_distributed_optimizer=true",
            f"checkpoint.async_save={str(is_async).lower()}",
        ]
    )
    assert composed is not None
    return composed[0]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
