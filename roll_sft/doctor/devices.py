"""How fast each device of this machine multiplies matrices, and all of them sum a buffer.

    python -m roll_sft.doctor.devices [--seconds S]      one JSON object on stdout

A process of its own, so that a driver that hangs ends with it. Floating point operations of a
product of [n, n] matrices: 2 n^3. Bus bandwidth of an all-reduce as nccl-tests defines it: bytes x
2 (w - 1) / w / seconds, https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CPU_RANKS = 2  # of the sum, on a machine without GPUs
_ON_CUDA, _ON_CPU = 8192, 1024  # n
_SUMMED_BYTES = {"cuda": 256 * 1024**2, "cpu": 16 * 1024**2}
_TIMEOUT_S = 60.0


def measured(seconds: float, *, cpu_ranks: int = _CPU_RANKS) -> dict[str, Any]:
    """Devices with their TFLOP/s, and GB/s of an all-reduce over them.

    Without GPUs `cpu_ranks` processes take part in the all-reduce; with 1 there is none.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(index) for index in range(count)] or ["CPU"]
    kinds = [f"cuda:{index}" for index in range(count)] or ["cpu"]
    share = seconds / 2 / len(kinds)
    devices = [
        {"device": kind, "name": name, "tflops": _tflops(torch.device(kind), share)}
        for kind, name in zip(kinds, names, strict=True)
    ]
    found: dict[str, Any] = {
        "devices": devices,
        "driver": _driver() if count else None,
        "nccl": _nccl() if count else None,
    }
    world = count or cpu_ranks
    if world > 1:
        found["all_reduce"] = {"ranks": world, **_summed_by_all(world, seconds / 2)}
    return found


def _tflops(device: torch.device, seconds: float) -> float:
    is_cuda = device.type == "cuda"
    size, dtype = (_ON_CUDA, torch.bfloat16) if is_cuda else (_ON_CPU, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        left @ right
    products, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or not products:
        for _ in range(10 if is_cuda else 1):
            left @ right
            products += 1
        if is_cuda:
            torch.cuda.synchronize(device)
    return 2 * size**3 * products / elapsed / 1e12


def _summed_by_all(world: int, seconds: float) -> dict[str, Any]:
    """The all-reduce by `world` processes of this machine; an error in place of its figure."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        command = [sys.executable, "-m", "roll_sft.doctor.devices", "--seconds", str(seconds)]
        command += ["--world", str(world), "--store", str(store), "--rank"]
        ranks = [
            subprocess.Popen(
                [*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for rank in range(world)
        ]
        try:
            outcomes = [rank.communicate(timeout=_TIMEOUT_S + seconds) for rank in ranks]
        except subprocess.TimeoutExpired:
            return {"error": f"no end within {_TIMEOUT_S + seconds:.0f} s"}
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    if any(rank.returncode for rank in ranks):
        said = [line for _, errors in outcomes for line in errors.strip().splitlines()[-1:]]
        return {"error": said[0] if said else "a rank ended"}
    return {"gb_s": json.loads(outcomes[0][0])}


def _one_rank(rank: int, world: int, store: Path, seconds: float) -> float:
    """GB/s on the bus, measured by this rank."""
    is_cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{rank}" if is_cuda else "cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        store=dist.FileStore(str(store), world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=_TIMEOUT_S),
    )
    buffer = torch.ones(_SUMMED_BYTES[device.type] // 4, device=device)
    for _ in range(2):
        dist.all_reduce(buffer, op=dist.ReduceOp.MAX)
    started = time.perf_counter()
    dist.all_reduce(buffer, op=dist.ReduceOp.MAX)
    if is_cuda:
        torch.cuda.synchronize(device)
    rounds = torch.tensor([seconds / max(time.perf_counter() - started, 1e-6)], device=device)
    dist.broadcast(rounds, src=0)  # all ranks take as many
    count, started = max(1, int(rounds.item())), time.perf_counter()
    for _ in range(count):
        dist.all_reduce(buffer, op=dist.ReduceOp.MAX)
    if is_cuda:
        torch.cuda.synchronize(device)
    elapsed = time.perf_counter() - started
    dist.destroy_process_group()
    return count * _SUMMED_BYTES[device.type] * 2 * (world - 1) / world / elapsed / 1e9


def _nccl() -> str:
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, version))


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(shown.stdout.splitlines()), None)


def main() -> None:
    """Print what was measured; with --rank, be one rank of the all-reduce."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--cpu-ranks", type=int, default=_CPU_RANKS)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--world", type=int, default=0)
    parser.add_argument("--store", type=Path, default=Path())
    options = parser.parse_args()
    if options.rank is not None:
        found: Any = _one_rank(options.rank, options.world, options.store, options.seconds)
    else:
        found = measured(options.seconds, cpu_ranks=options.cpu_ranks)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
