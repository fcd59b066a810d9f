"""Model folders from strangers, through `dry_run`, `prepare_only` and the import to a checkpoint.

Nothing in a folder runs, reads or writes outside of it, or goes on for ever. A configuration
that is accepted is one that transformers builds, with as many parameters; weights that are accepted
are those that safetensors' own reader finds; tokens that are kept are inside the embedding.
"""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from roll_sft.config.build import build_config
from roll_sft.convert import command
from roll_sft.job.in_process import prepare_job
from tests.doors import alpaca
from tests.doors import write_rows as write_lines
from tests.fuzz import model_damage
from tests.fuzz.case import Case, run_config
from tests.outcome import Outcome
from tests.parity import write_model

CODES = frozenset({0, 2, 3, 6})
SECRET = "a secret that lies outside"
KINDS = ("qwen2-tied", "qwen3", "llama", "llama3", "mistral", "olmo2")


def build(home: Path) -> None:
    """A model of each family, and rows."""
    for kind in KINDS:
        write_model(home / kind, kind=kind, num_layers=2)
    write_lines(home / "rows.jsonl", [alpaca(number) for number in range(6)])
    (home / "secret.txt").write_text(SECRET)


def case(rng: random.Random, home: Path) -> Case:
    """One model folder; the current folder is the case's own."""
    kind = rng.choice(KINDS)
    shutil.copytree(home / kind, "model")
    damage = model_damage
    makers = (damage.config, damage.tokenizer, damage.template) * 2
    makers += (damage.weights, damage.index, damage.any_file, damage.strange)
    maker = rng.choice(makers)
    what = maker(rng, Path("model"), home)
    doors: tuple[Callable[[str, Path], Case], ...] = (_planned, _prepared, _imported)
    if maker in (damage.template, damage.tokenizer):
        doors = (_prepared,)
    if maker in (damage.weights, damage.index):
        doors = (_prepared, _imported, _imported)
    return rng.choice(doors)(f"{kind}: {what}", home)


# The doors.


def _values(home: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": {"path": "model"},
        "data": {
            "train": [{"path": str(home / "rows.jsonl")}],
            "cache_dir": "cache",
            "sequence_length": 100,
        },
        "tracking": {"backends": ["jsonl"]},
        "parallel": {"device": "cpu"},
        **more,
    }


def _planned(what: str, home: Path) -> Case:
    return _run_of(f"dry_run of {what}", home, dry_run=True)


def _prepared(what: str, home: Path) -> Case:
    return _run_of(f"prepare of {what}", home, prepare_only=True)


def _run_of(what: str, home: Path, **more: Any) -> Case:
    values = _values(home, **more)

    def check(outcome: Outcome) -> list[str]:
        found = _ran_nothing()
        if outcome.code != 0:
            return found
        found += _shape_problems(outcome)
        if "prepare_only" in more:
            tokens = prepare_job(build_config(values)).data.train
            largest = max(int(tokens.sample(index)[0].max()) for index in range(len(tokens)))
            if largest >= (rows := _embedding_rows()):
                found.append(f"kept token {largest} of an embedding of {rows} rows")
        return found

    names = ("model", "data/", "rows.jsonl", "template")
    return Case(what=what, values=values, action=run_config, codes=CODES, names=names, check=check)


def _imported(what: str, home: Path) -> Case:
    """To a checkpoint, and back: the weights are those that another reader finds."""

    def check(outcome: Outcome) -> list[str]:
        found = _ran_nothing()
        if outcome.code != 0:
            return [*found, *(["a folder is left"] if Path("out").exists() else [])]
        source = _tensors(Path("model"))
        code = command.main(["--checkpoint", "out", "--output", "back"])
        if code:
            return [*found, f"imported to a checkpoint that is refused with exit {code}"]
        back = load_file("back/model.safetensors")
        # A tied head may be stored; it is the embedding.
        names = {n for n in source if n in back or n != "lm_head.weight"}
        if back.keys() != names:
            found.append(f"imported other tensors: {sorted(back.keys() ^ names)[:5]}")
        found += [
            f"imported another {name}"
            for name in sorted(back.keys() & names)
            if not _same(back[name], source[name])
        ]
        return found + _ran_nothing()

    return Case(
        what=f"import of {what}",
        program="roll_sft.convert.command",
        arguments=["--model", "model", "--output", "out"],
        codes=CODES,
        names=("model",),
        check=check,
    )


def _same(made: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether all numbers are equal, and none was rounded."""
    return torch.equal(made.double(), given.double())


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, by safetensors' own reader."""
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for name, file in index.items():
        found[name] = load_file(folder / file)[name]
    return found


def _ran_nothing() -> list[str]:
    found = ["the folder ran code"] if Path("canary").exists() else []
    for top in ("out", "back", "outputs"):
        for path in Path(top).rglob("*"):
            if path.is_file() and SECRET.encode() in path.read_bytes():
                found.append(f"{path} holds what lies outside of the model's folder")
    return found


def _embedding_rows() -> int:
    return int(json.loads(Path("model/config.json").read_text()).get("vocab_size", 10**9))


def _shape_problems(outcome: Outcome) -> list[str]:
    """What transformers makes of a configuration that was accepted."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained("model", local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # noqa: BLE001 -- whatever transformers makes of it
        return [f"accepted what transformers does not build: {error!r:.200}"]
    number = sum(parameter.numel() for parameter in model.parameters())
    if f"{number:,}" not in outcome.stdout and str(number) not in outcome.stdout:
        return [f"transformers counts {number:,} parameters, and the plan does not"]
    numbers = [v for v in config.to_dict().values() if isinstance(v, float)]
    numbers += [v for v in (config.rope_parameters or {}).values() if isinstance(v, float)]
    if any(not math.isfinite(each) for each in numbers):
        return [f"accepted a configuration whose numbers are not finite: {numbers}"]
    if config.rms_norm_eps <= 0 or config.rope_parameters["rope_theta"] <= 0:
        return ["accepted an epsilon or a base of the rotation that is not above zero"]
    return []
