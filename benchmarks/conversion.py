"""Conversion in both directions beside a plain copy of the same files, and the memory it takes.

    python benchmarks/conversion.py

A model with eight layers of Qwen2.5-0.5B, in bf16, of random numbers (0.5 GB). A conversion ends
with its bytes on disk and so does the copy; pairs are interleaved. Memory is what the converting
process holds of its own (RssAnon), above what it holds when everything is imported; pages of mapped
files are the kernel's, which takes them back when it needs them, and are told beside it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file
from shared import measures
from transformers import Qwen2Config

from roll_sft.convert import command
from roll_sft.models.source import family_of

PACKAGES = ("torch", "safetensors")
GOAL = ">= 0.8"
DENOMINATOR = "a copy of the same files, on disk when it ends"
CHILD = """
import sys
import torch
from roll_sft.convert import command, to_hf, from_hf
torch.zeros(8).sum()
print("ready", flush=True)
sys.stdin.readline()
sys.exit(command.main(sys.argv[1:]))
"""


def main() -> None:
    """Measures and prints one line for each direction and each memory."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=measures.pairs(9))
    parser.add_argument("--layers", type=int, default=measures.size(8, quick=2))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        largest = _write_model(folder / "model", options.layers)
        _converted(folder / "model", folder / "megatron")
        for source, what in (("model", "import_over_copy"), ("megatron", "export_over_copy")):
            _converted(folder / source, folder / "out")  # the first reads the source from disk
            pairs = [
                (
                    _copied(folder / source, folder / "out"),
                    _converted(folder / source, folder / "out"),
                )
                for _ in range(options.pairs)
            ]
            ratios = [copy_s / ours_s for copy_s, ours_s in pairs]
            measures.show(what, ratios, goal=GOAL, denominator=DENOMINATOR, packages=PACKAGES)
        for source, what in (("model", "import_memory"), ("megatron", "export_memory")):
            own, mapped = _memory(folder / source, folder / "out")
            print(f"{what}: {own >> 20} MiB own, {mapped >> 20} MiB of files", file=sys.stderr)
            shard = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
            ratio = own / (1.3 * shard + largest)
            goal = "<= 1"
            denominator = "1.3 x the largest output file + one tensor"
            measures.show(what, [ratio], goal=goal, denominator=denominator, packages=PACKAGES)


def _write_model(folder: Path, num_layers: int) -> int:
    """A model folder; returns the bytes of its largest tensor."""
    folder.mkdir()
    config = Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=num_layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151_936,
        tie_word_embeddings=True,
        architectures=["Qwen2ForCausalLM"],
        dtype=torch.bfloat16,
    )
    config.save_pretrained(folder)
    family = family_of(config)
    tensors = {
        name: torch.randn(shape).to(torch.bfloat16)
        for name, shape in family.hf_shapes(family.shape(config)).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return max(tensor.nbytes for tensor in tensors.values())


def _converted(source: Path, output: Path) -> float:
    """Seconds of a conversion; the direction follows from `source`."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    started = time.perf_counter()
    with open(os.devnull, "w") as nowhere:
        standard, sys.stdout = sys.stdout, nowhere
        try:
            code = command.main([str(source), "--output", str(output)])
        finally:
            sys.stdout = standard
    assert code == 0, f"the conversion of {source} failed"
    return time.perf_counter() - started


def _copied(source: Path, output: Path) -> float:
    """Seconds to copy the files of `source` and to sync them."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    started = time.perf_counter()
    shutil.copytree(source, output)
    for path in output.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    return time.perf_counter() - started


def _memory(source: Path, output: Path) -> tuple[int, int]:
    """The most that a conversion held above its imports: of its own, and of mapped files."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-c", CHILD, str(source), "--output", str(output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdout.readline()
        first = most = _resident(program.pid)
        program.stdin.write(b"\n")
        program.stdin.flush()
        while program.poll() is None:
            now = _resident(program.pid)
            most = (max(most[0], now[0]), max(most[1], now[1]))
            time.sleep(0.002)
    assert program.returncode == 0
    return most[0] - first[0], most[1] - first[1]


def _resident(pid: int) -> tuple[int, int]:
    """Bytes of a process's own memory and of mapped files."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except (OSError, psutil.NoSuchProcess):
        return 0, 0
    values = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    sizes = [int(values.get(name, "0 kB").split()[0]) << 10 for name in ("RssAnon", "RssFile")]
    return sizes[0], sizes[1]


if __name__ == "__main__":
    main()
