"""What a checkpoint costs beside the same bytes written plainly, and what its checks read.

    python benchmarks/checkpoint_speed.py

One rank's writer, with tensors of the shapes of a decoder layer, and the files of a real temporary
folder. Four measures: a blocking save beside writing and syncing the same bytes; how long training
stands still for a save in the background beside a blocking one, in the memory that the first such
save took; bytes that verification reads, and bytes that four ranks read who load a quarter each as
data ranks do, beside those of the checkpoint. Pairs are interleaved; `ratio` is the median of the
pairs' ratios, `low` and `high` are the extremes.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from shared import measures

from roll_sft.checkpoint import tensors
from roll_sft.checkpoint.background import BackgroundWriter
from roll_sft.checkpoint.index import read_index
from roll_sft.checkpoint.manifest import StoredFile, sha256_of, verify_hashes
from roll_sft.checkpoint.publish import write_descriptions
from roll_sft.checkpoint.tensors import Piece, Writer, take_parts

PAIRS = measures.pairs(9)
NUM_LAYERS, HIDDEN, FFN = 4, 1024, 2816  # 0.45 GiB with two moments
NUM_RANKS = 4


def main() -> None:
    """Measures and prints one JSON line for each."""
    pieces = _pieces()
    with tempfile.TemporaryDirectory() as name:
        folder, writer = Path(name), BackgroundWriter()
        _stall(writer, folder, pieces)  # takes the memory of the copies
        speeds, stalls = [], []
        for _ in range(PAIRS):
            plain_s, saved_s = _plain(folder, pieces), _saved(folder, pieces)
            speeds.append(plain_s / saved_s)
            stalls.append(_stall(writer, folder, pieces) / saved_s)
        _report("checkpoint_save", speeds, goal=">= 0.8", denominator="write + fsync, same bytes")
        _report("checkpoint_stall", stalls, goal="<= 0.1", denominator="a blocking save")
        _report_reads(folder, pieces)


def _pieces() -> list[Piece]:
    """Weights and two moments of a small model, each layer a rectangle of a stored tensor."""
    shapes = {"qkv": (3 * HIDDEN, HIDDEN), "proj": (HIDDEN, HIDDEN), "fc1": (2 * FFN, HIDDEN)}
    return [
        Piece(f"{kind}.{name}", (NUM_LAYERS, *shape), (layer, 0, 0), torch.randn(1, *shape))
        for kind in ("weight", "exp_avg", "exp_avg_sq")
        for name, shape in shapes.items()
        for layer in range(NUM_LAYERS)
    ]


def _plain(folder: Path, pieces: Sequence[Piece]) -> float:
    """Seconds to write and sync the bytes of `pieces`, and no more."""
    started = time.perf_counter()
    with (folder / "plain").open("wb", buffering=0) as file:
        for piece in pieces:
            file.write(memoryview(piece.tensor.numpy()).cast("B"))
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    (folder / "plain").unlink()
    return seconds


def _write(folder: Path, pieces: Sequence[Piece]) -> None:
    tensors.write(folder, pieces, objects={}, writer=Writer(0, 1, optimizer_step=1))


def _saved(folder: Path, pieces: Sequence[Piece]) -> float:
    """Seconds of a blocking save, hashes and descriptions included."""
    staging = folder / "saved"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    started = time.perf_counter()
    _write(staging, pieces)
    write_descriptions(staging, take_parts(staging))
    return time.perf_counter() - started


def _stall(writer: BackgroundWriter, folder: Path, pieces: Sequence[Piece]) -> float:
    """Seconds until training may go on where the save is written beside."""
    started = time.perf_counter()
    writer.begin(pieces, lambda copies: _write(folder, copies))
    seconds = time.perf_counter() - started
    writer.finish()
    return seconds


def _report_reads(folder: Path, pieces: Sequence[Piece]) -> None:
    saved = folder / "saved"
    files = [path for path in saved.iterdir() if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    facts = {path.name: StoredFile(path.stat().st_size, sha256_of(path)) for path in files}
    before = _bytes_read()
    verify_hashes(saved, facts)
    ratio = (_bytes_read() - before) / size
    _report("checkpoint_verify", [ratio], goal="<= 1.05", denominator="bytes of the checkpoint")
    before = _bytes_read()
    for rank in range(NUM_RANKS):
        index = read_index(saved)
        for piece in pieces[rank::NUM_RANKS]:
            index.fill(piece)
    ratio = (_bytes_read() - before) / size
    _report("checkpoint_load", [ratio], goal="<= 1.2", denominator="bytes of the checkpoint")


def _bytes_read() -> int:
    """What this process has asked the kernel to read so far."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def _report(name: str, ratios: list[float], *, goal: str, denominator: str) -> None:
    measures.show(name, ratios, goal=goal, denominator=denominator, packages=("torch",))


if __name__ == "__main__":
    main()
