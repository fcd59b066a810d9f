"""Adapter folders that are spoilt: started from, and merged into their base."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.doors import alpaca
from tests.fuzz.case import Case, run_config
from tests.fuzz.mutate import ODD_NUMBERS, ODD_TEXTS, brief, changed, damaged, odd_value
from tests.parity import write_model

CODES = frozenset({0, 2, 6})
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEYS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "modules_to_save",
        "peft_type", "bias", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern",
        "base_model_name_or_path", "task_type", "auto_mapping", "layers_to_transform",
        "megatron_config", "runtime_config")  # fmt: skip
SECRET = "a secret that lies outside"


def build(home: Path) -> None:
    """A model with an adapter, and rows."""
    from tests.lora import write_adapter

    write_model(home / "model", kind="qwen2-tied", num_layers=2)
    write_adapter(home / "model", home / "adapter", r=4, lora_alpha=8, target_modules="all-linear")
    rows = "".join(f"{json.dumps(alpaca(number))}\n" for number in range(6))
    (home / "rows.jsonl").write_text(rows)
    (home / "secret.txt").write_text(SECRET)


def case(rng: random.Random, home: Path) -> Case:
    """One adapter folder; the current folder is the case's own."""
    shutil.copytree(home / "adapter", "adapter")
    shutil.copytree(home / "model", "model")
    damage = rng.choice((_config, _config, _weights, _weights, _bytes, _strange))
    what = damage(rng, Path("adapter"), home)
    return rng.choice((_started, _merged))(what, home)


# The doors


def _started(what: str, home: Path) -> Case:
    values = {
        "model": {"path": "model"},
        "data": {
            "train": [{"path": str(home / "rows.jsonl")}],
            "cache_dir": "cache",
            "sequence_length": 100,
        },
        "lora": {"rank": 4, "alpha": 8, "adapter_path": "adapter"},
        "tracking": {"backends": ["jsonl"]},
        "parallel": {"device": "cpu"},
        "prepare_only": True,
    }
    return Case(
        what=f"start from {what}",
        values=values,
        action=run_config,
        codes=CODES,
        names=("lora.", "adapter"),
        check=lambda _: _shows_nothing(),
    )


def _merged(what: str, _home: Path) -> Case:
    def check(outcome: Any) -> list[str]:
        found = _shows_nothing()
        if outcome.code == 0:
            merged = load_file("out/model.safetensors")
            found += [f"{n} is not finite" for n, t in merged.items() if not t.isfinite().all()]
        elif Path("out").exists():
            found.append("a folder is left")
        return found

    return Case(
        what=f"merge of {what}",
        program="roll_sft.convert.merge_lora",
        arguments=["--base", "model", "--adapter", "adapter", "--output", "out"],
        codes=CODES | {5},  # weights that are not finite
        names=("adapter", "--"),
        check=check,
    )


def _shows_nothing() -> list[str]:
    found = ["the folder ran code"] if Path("canary").exists() else []
    for top in ("out", "outputs"):
        for path in Path(top).rglob("*"):
            if path.is_file() and SECRET.encode() in path.read_bytes():
                found.append(f"{path} holds what lies outside of the folder")
    return found


# The damage


def _config(rng: random.Random, folder: Path, _home: Path) -> str:
    config = json.loads((folder / CONFIG).read_text())
    if rng.random() < 0.8:
        key = rng.choice(KEYS)
        config[key] = rng.choice((*ODD_NUMBERS, *ODD_TEXTS, odd_value(rng), ["q_proj"], "all", []))
        what = f"{key} = {brief(config[key])}"
    else:
        config, what = changed(rng, config)
    text = json.dumps(config)
    (folder / CONFIG).write_text(text)
    return f"{CONFIG}: {what}"


def _weights(rng: random.Random, folder: Path, _home: Path) -> str:
    tensors = load_file(folder / WEIGHTS)
    name = rng.choice(sorted(tensors))
    kind = rng.choice(("lost", "renamed", "shape", "dtype", "nan", "more", "odd", "none"))
    if kind == "lost":
        del tensors[name]
    elif kind == "renamed":
        tensors[rng.choice(ODD_TEXTS[2:12]) + name] = tensors.pop(name)
    elif kind == "shape":
        tensors[name] = torch.zeros(rng.choice(((1,), (3, 5), (0, 4), (2, 2, 2))))
    elif kind == "dtype":
        tensors[name] = tensors[name].to(rng.choice((torch.int8, torch.float64, torch.bfloat16)))
    elif kind == "nan":
        tensors[name].view(-1)[0] = rng.choice((float("nan"), float("inf"), 1e38))
    elif kind == "more":
        tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 32)
    elif kind == "odd":
        replaced = rng.choice(("layers.9", "layers.x", "layers.-1", "layers.0.0"))
        tensors[name.replace("layers.0", replaced)] = tensors[name].clone()
    else:
        tensors = {}
    save_file(tensors, folder / WEIGHTS)
    return f"{WEIGHTS}: {kind} {name}"


def _bytes(rng: random.Random, folder: Path, _home: Path) -> str:
    name = rng.choice((CONFIG, WEIGHTS))
    content, what = damaged(rng, (folder / name).read_bytes())
    (folder / name).write_bytes(content)
    return f"{name}: {what}"


def _strange(rng: random.Random, folder: Path, home: Path) -> str:
    name = rng.choice((CONFIG, WEIGHTS))
    path = folder / name
    path.unlink()
    makers: dict[str, Callable[[], object]] = {
        "missing": lambda: None,
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to(home / "secret.txt"),
        "loop": lambda: path.symlink_to(path.name),
        "zero": lambda: path.symlink_to("/dev/zero"),
        "empty": lambda: path.write_bytes(b""),
        "pickle": lambda: (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'id'\ntR."),
    }
    kind = rng.choice(sorted(makers))
    makers[kind]()
    return f"{name}: {kind}"
