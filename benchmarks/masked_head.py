"""What the loss costs in memory and time, against logits of every row at once.

    python benchmarks/masked_head.py [--tokens N]

`masked_head_memory`: the most memory that the head and its loss hold, forward and backward, beyond
their inputs and the gradient of the weight, against fp32 logits of all tokens. `masked_head_time`:
the CPU time (on CUDA the time) of the same, where 40 % of the tokens carry no label, against the
same code where all do. Qwen2.5's vocabulary of 151,936 words, hidden size 896; bf16 on CUDA and
fp32 on the CPU. Pairs are interleaved; `ratio` is the median, `low` and `high` are the extremes.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from shared import measures

WORDS, HIDDEN, SHARE = 151_936, 896, 0.6
PAIRS = measures.pairs(5)
MEMORY_GOAL, TIME_GOAL = 0.15, 0.65
POLL_S = 0.0005


def main() -> None:
    """Measures and prints two JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, help="rows of hidden states; 8192 on CUDA, else 1024")
    tokens = parser.parse_args().tokens or (8192 if torch.cuda.is_available() else 1024)
    with _one_rank():
        step = _Step(tokens)
        step.run(step.labelled)
        logits_bytes = tokens * WORDS * 4
        memory = [step.peak_bytes(step.labelled) / logits_bytes for _ in range(PAIRS)]
        times = [step.seconds(step.labelled) / step.seconds(step.all) for _ in range(PAIRS)]
    shape = f"{tokens} tokens x {WORDS} words"
    _print("masked_head_memory", memory, goal=MEMORY_GOAL, denominator=f"fp32 logits, {shape}")
    _print("masked_head_time", times, goal=TIME_GOAL, denominator=f"all rows labelled, {shape}")


class _Step:
    """The head's forward and backward over `tokens` hidden states, with labels on some of them."""

    def __init__(self, tokens: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        generator = torch.Generator(self.device).manual_seed(0)
        options = {"device": self.device, "dtype": dtype}
        self.hidden = torch.randn(tokens, HIDDEN, generator=generator, **options)  # type: ignore[call-overload]
        self.weight = torch.randn(WORDS, HIDDEN, generator=generator, **options)  # type: ignore[call-overload]
        self.weight = (self.weight / HIDDEN**0.5).requires_grad_()
        self.labels = torch.randint(0, WORDS, (tokens,), device=self.device, generator=generator)
        order = torch.randperm(tokens, device=self.device, generator=generator)
        self.labelled = order[: round(SHARE * tokens)].sort().values
        self.all = torch.arange(tokens, device=self.device)

    def run(self, rows: torch.Tensor) -> None:
        """One forward and backward over `rows`."""
        from roll_sft.engine.loss import cross_entropy_of_rows

        hidden = self.hidden.detach().requires_grad_()
        losses = cross_entropy_of_rows(
            hidden[rows], self.weight, self.labels[rows], vocab_size=WORDS
        )
        losses.sum().backward()
        self.weight.grad = None

    def seconds(self, rows: torch.Tensor) -> float:
        """CPU time of one run on the CPU, time on CUDA."""
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        self._wait()
        started = clock()
        self.run(rows)
        self._wait()
        return clock() - started

    def peak_bytes(self, rows: torch.Tensor) -> int:
        """What one run holds at most beyond its inputs and the fp32 gradient of the weight."""
        gradient_bytes = self.weight.numel() * 4
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.run(rows)
            return torch.cuda.max_memory_allocated() - before - gradient_bytes
        return _peak_rss(lambda: self.run(rows)) - gradient_bytes

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _peak_rss(action: Callable[[], None]) -> int:
    """Growth of this process's resident memory while `action` runs, by polling."""
    process, done, peak = psutil.Process(), threading.Event(), 0

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(POLL_S)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    action()
    done.set()
    watcher.join()
    return peak - before


@contextmanager
def _one_rank() -> Iterator[None]:
    from roll_sft.base.layout import ParallelLayout
    from roll_sft.engine.process_groups import Rendezvous, process_groups

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        layout = ParallelLayout(world_size=1)
        rendezvous = Rendezvous(0, 0, 1, 60.0, 60.0)
        with process_groups(rendezvous, layout, device=device, store=store):
            yield


def _print(name: str, ratios: list[float], *, goal: float, denominator: str) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    packages = ("torch", "megatron-core")
    measures.show(
        name,
        ratios,
        goal=f"<= {goal}",
        denominator=denominator,
        packages=packages,
        device=device,
    )


if __name__ == "__main__":
    main()
