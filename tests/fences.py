"""Fenced blocks of Markdown pages, and the folder in which a page's commands run.

A block of `bash` is run as it stands, unless a comment on the line before it says otherwise:

    <!-- notest: WHY -->   is not run
    <!-- plan: WHY -->     `roll-sft train` prints the plan of the run and does not train

In a command `...` stands for the arguments of a small run. A block that begins with a comment of a
file's name, as in `# mine.py`, is written to that file.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.doors import alpaca, write_rows
from tests.job.test_presets import GPT_OSS_20B, QWEN3_30B_A3B, QWEN_7B
from tests.job.test_shipped_recipes import LLAMA_8B, qwen3
from tests.parity import write_model

_BLOCK = re.compile(
    r"(?:^<!-- (\w+): ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL
)
_FILE = re.compile(r"(?:# |\{#- )([\w.]+\.\w+)\b")
_ARGUMENTS = "model.path=MODEL 'data.train=[{path: FILE.jsonl}]'"
_MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "vocab_size": 32000,
}
# Models that pages name by their folder, by what is published of them: enough for a plan.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "MIXTRAL": _MIXTRAL_8X7B,
    "models/Qwen2.5-7B": QWEN_7B,
    "models/mine": QWEN_7B,
    "models/Llama-3.1-8B": LLAMA_8B,
    "models/Qwen3-8B": qwen3(4096, 12288, 36, 32, tied=False),
    "models/Qwen3-30B-A3B": QWEN3_30B_A3B,
    "models/gpt-oss-20b": GPT_OSS_20B,
}
_OF_TRL = {
    "model_name_or_path": "MODEL",
    "dataset_name": "allenai/tulu-3-sft-mixture",
    "learning_rate": 1e-5,
    "per_device_train_batch_size": 4,
}


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, its text, and the mark before it with its reason."""

    language: str
    text: str
    mark: str | None
    reason: str | None


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of `page`, in order."""
    found = _BLOCK.findall(page.read_text(encoding="utf-8"))
    return [Block(name, text, mark or None, why or None) for mark, why, name, text in found]


def commands(page: Path) -> list[list[str]]:
    """The words of each `roll-sft` command in the blocks of `page`, after that name."""
    text = "".join(each.text for each in blocks(page) if each.language == "bash")
    lines = re.findall(r"\broll-sft (.*)", text.replace("\\\n", " "))
    ends = (re.split(r" [>|] ", line)[0] for line in lines)
    return [[word for word in shlex.split(each, comments=True) if word != "..."] for each in ends]


def script(page: Path, folder: Path) -> str:
    """The commands of `page` that run, for bash in `folder`; files are written there."""
    lines = ["set -euo pipefail"]
    for block in blocks(page):
        file = _FILE.match(block.text)
        if file is not None and block.language != "bash":
            (folder / file[1]).write_text(block.text, encoding="utf-8")
        elif block.language == "bash" and block.mark != "notest":
            lines.append(_as_run(block, folder))
    return "\n".join(lines)


def _as_run(block: Block, folder: Path) -> str:
    text = block.text.replace(" ... ", f" {_ARGUMENTS} ").replace("/models/", f"{folder}/models/")
    text = text.replace("step_00000150", newest(folder / "outputs/my_run").name)
    if block.mark == "plan":
        text = text.replace("roll-sft train", "roll-sft plan").replace("roll-sft chat", "true")
    return text


def newest(run: Path) -> Path:
    """The newest step folder of `run`."""
    return max((run / "checkpoints").glob("step_*"))


def make_folder(folder: Path) -> Path:
    """Fill `folder` with the models, files and runs that pages name."""
    model = write_model(folder / "MODEL", kind="qwen2-wide", num_layers=6)
    config = json.loads((model / "config.json").read_text())
    config |= {"max_position_embeddings": 32768}  # samples are up to 4,096 tokens by default
    (model / "config.json").write_text(json.dumps(config))
    shutil.copytree(model, folder / "Qwen" / "Qwen2.5-0.5B")
    for name, published in _PUBLISHED.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(published))
    rows = [alpaca(number) for number in range(24)]
    for name in ("FILE", "my", "HELD_OUT", "held_out", "questions"):
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "allenai" / "tulu-3-sft-mixture").mkdir(parents=True)
    write_rows(folder / "allenai" / "tulu-3-sft-mixture" / "train.jsonl", rows)
    (folder / "FILE").write_text(json.dumps(_OF_TRL))
    run(f"roll-sft train {_ARGUMENTS} run_name=my_run", folder)
    for name in "abc":
        shutil.copytree(folder / "outputs" / "my_run", folder / "outputs" / name)
    return folder


def run(commands: str, folder: Path) -> str:
    """Run `commands` in bash, as a user of this interpreter does; returns what they print."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    known = {"PATH": path, "HOME": str(folder), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", commands],
        cwd=folder,
        env={**os.environ, **known, "RAY_TMPDIR": f"/tmp/r{os.getpid()}"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{commands}\nended with {done.returncode}:\n{done.stdout[-3000:]}"
    return done.stdout
