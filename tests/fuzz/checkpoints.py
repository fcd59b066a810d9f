"""Checkpoint folders through resume and conversion, damaged by chance and made to deceive.

Damage is never accepted in silence: a run goes on from a folder that is as it was written, and a
conversion writes what it would have written. A folder whose hashes agree with what it holds may say
anything, but runs nothing, and gives nothing away that lies outside of it.
"""

import functools
import hashlib
import json
import os
import random
import shutil
import tarfile
from pathlib import Path
from typing import Any

import torch

from roll_sft.checkpoint.index import read_index
from roll_sft.checkpoint.resume import find_checkpoint, make_way, start_from
from roll_sft.checkpoint.tensors import Piece
from roll_sft.config.build import build_config
from roll_sft.config.schema import RunConfig
from roll_sft.convert import command
from roll_sft.job.in_process import prepare_job
from roll_sft.job.job import Job
from tests.fuzz.case import Case, Outcome
from tests.fuzz.mutate import brief, changed, damaged, odd_value

CODES = frozenset({0, 2, 4, 6})
GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint_schema_2.tar.gz"
STEP = "step_00000002"
SECRET = "a secret that lies outside"
MANIFEST, INDEX, ASSETS = "manifest.json", "index.json", "hf_assets"


def build(home: Path) -> None:
    """Two checkpoints of one run, what they convert to, and a file outside of both."""
    checkpoints = home / "checkpoints"
    with tarfile.open(GOLDEN) as archive:
        archive.extractall(checkpoints / STEP, filter="data")
    later = checkpoints / "step_00000004"
    shutil.copytree(checkpoints / STEP, later)
    manifest = json.loads((later / MANIFEST).read_text())
    manifest.update(step=4, optimizer_step=4)
    (later / MANIFEST).write_text(json.dumps(manifest))
    (home / "secret.txt").write_text(SECRET)
    lines = [
        {"instruction": f"What is {number} and {number + 1}?", "output": f"It is {2 * number + 1}."}
        for number in range(8)
    ]
    (home / "rows.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert (
        command.main(["--checkpoint", str(checkpoints / STEP), "--output", str(home / "hf")]) == 0
    )


def case(rng: random.Random, home: Path) -> Case:
    """One checkpoint; the current folder is the case's own."""
    shutil.copytree(home / "checkpoints", "checkpoints")
    target = Path("checkpoints", rng.choice((STEP, "step_00000004", "step_00000004")))
    makers = (
        _flipped,
        _flipped,
        _forged,
        _forged,
        _forged_file,
        _missing,
        _linked,
        _renamed,
        _deceiving,
    )
    what, is_honest = rng.choice(makers)(rng, target, home)
    return rng.choice((_resumed, _converted))(f"{target.name}: {what}", target, home, is_honest)


# What is done to a folder: returns what, and whether the manifest still tells damage from the
# original. `rng`, the step folder, and the home of the assets.

Damage = tuple[str, bool]


def _flipped(rng: random.Random, folder: Path, _home: Path) -> Damage:
    """Bytes of any file but the manifest."""
    path = rng.choice([p for p in _files(folder) if p.name != MANIFEST])
    data, how = damaged(rng, path.read_bytes())
    path.write_bytes(data)
    return f"{path.name}: {how}", True


def _forged(rng: random.Random, folder: Path, _home: Path) -> Damage:
    """Fields of the manifest."""
    path = folder / MANIFEST
    if rng.random() < 0.2:
        data, how = damaged(rng, path.read_bytes())
        path.write_bytes(data)
        return f"{MANIFEST}: {how}", False
    manifest = json.loads(path.read_text())
    what = []
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.5:
            key = rng.choice(list(manifest))
            manifest[key] = odd_value(rng)
            what.append(f"{key} = {brief(manifest[key])}")
        else:
            manifest, change = changed(rng, manifest)
            what.append(change)
        if not isinstance(manifest, dict):
            break
    path.write_text(_as_json(manifest))
    return f"{MANIFEST}: {'; '.join(what)}", False


def _forged_file(rng: random.Random, folder: Path, _home: Path) -> Damage:
    """A file that says something else, and a manifest that agrees with it."""
    path = rng.choice([p for p in _files(folder) if p.name != MANIFEST])
    if path.suffix == ".json" and rng.random() < 0.8:
        value, how = changed(rng, json.loads(path.read_text()))
        path.write_text(_as_json(value))
    else:
        data, how = damaged(rng, path.read_bytes())
        path.write_bytes(data)
    _agree(folder, path)
    return f"{path.name}, with its hash: {how}", False


def _missing(rng: random.Random, folder: Path, _home: Path) -> Damage:
    path = rng.choice(sorted(folder.rglob("*")))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if rng.random() < 0.3:
        path.mkdir()
    return f"{path.name} is {'a folder' if path.is_dir() else 'gone'}", True


def _linked(rng: random.Random, folder: Path, home: Path) -> Damage:
    """Links in place of a file, or beside the files, to what lies outside."""
    secret = home / "secret.txt"
    kind = rng.choice(("asset", "file", "assets", "listed", "loop"))
    if kind == "asset":
        name = rng.choice(("added_tokens.txt", "vocab.json", "README.md", "evil.py", "notes.json"))
        (folder / ASSETS / name).symlink_to(secret)
        if rng.random() < 0.7:
            _agree(folder, folder / ASSETS / name)
        return f"{ASSETS}/{name} is a link out of it", False
    if kind == "listed":
        manifest = json.loads((folder / MANIFEST).read_text())
        name = rng.choice((os.path.relpath(secret, folder), str(secret), "../../../../etc/passwd"))
        facts = {"size": len(SECRET), "sha256": hashlib.sha256(SECRET.encode()).hexdigest()}
        manifest["files"][name] = facts
        (folder / MANIFEST).write_text(json.dumps(manifest))
        return f"{MANIFEST} lists {name}", False
    path = folder / ASSETS if kind == "assets" else rng.choice(_files(folder))
    moved = Path("elsewhere")
    path.rename(moved)
    path.symlink_to(path.name if kind == "loop" else moved.resolve())
    return f"{path.name} is a link {'to itself' if kind == 'loop' else 'out of the folder'}", False


def _renamed(rng: random.Random, folder: Path, _home: Path) -> Damage:
    name = rng.choice(
        ("step_00000003", "step_7", "step_99999999999999999999", "step_00000000", "step_-3",
        "latest",
         "step_\u0663", ".staging_00000004", "step_00000004.tmp", "STEP_00000004", "a b",
         "\x1b[31m")
    )  # fmt: skip
    if rng.random() < 0.5:
        shutil.copytree(folder, folder.with_name(name)) if not folder.with_name(
            name
        ).exists() else None
    elif not folder.with_name(name).exists():
        folder.rename(folder.with_name(name))
    return f"it is called {name!r}", False


def _deceiving(rng: random.Random, folder: Path, home: Path) -> Damage:
    """What a stranger would put there."""
    kind = rng.choice(("code", "pickle", "huge", "outside", "negative", "shape", "many"))
    if kind == "code":
        (folder / ASSETS / "evil.py").write_text("open('canary', 'w').write('x')\n")
        path = folder / ASSETS / rng.choice(("config.json", "tokenizer_config.json"))
        content = json.loads(path.read_text())
        names = {
            "AutoConfig": "evil.C",
            "AutoTokenizer": ["evil.T", None],
            "AutoModelForCausalLM": "evil.M",
        }
        content["auto_map"] = names
        path.write_text(json.dumps(content))
        _agree(folder, path)
        _agree(folder, folder / ASSETS / "evil.py")
        return f"{path.name} names code", False
    if kind == "pickle":
        path = folder / rng.choice((".metadata", "common.pt", "x.pkl"))
        path.write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
        _agree(folder, path)
        return f"{path.name} is a pickle that runs a command", False
    path = folder / INDEX
    index = json.loads(path.read_text())
    key = rng.choice(list(index["tensors"]))
    entry = index["tensors"][key]
    chunk = rng.choice(entry["chunks"])
    if kind == "huge":
        entry["shape"] = [2**40, *entry["shape"][1:]]
    elif kind == "outside":
        chunk[2] = rng.choice((str(home / "secret.txt"), "../secret.txt", "..", "", "nope"))
    elif kind == "negative":
        chunk[rng.choice((3, 4, 5))] = rng.choice((-1, 2**40, -(2**63), 10**30, None, "x", 1.5))
    elif kind == "shape":
        chunk[rng.choice((0, 1))] = rng.choice(
            ([], [-1], [2**62] * 3, [0, 0], None, ["x"], [1.5, 2])
        )
    else:
        entry["chunks"] = entry["chunks"] * 3
    path.write_text(json.dumps(index))
    _agree(folder, path)
    return f"{INDEX}: {key}: {kind}", False


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _agree(folder: Path, path: Path) -> None:
    """Make the manifest say what `path` holds."""
    manifest = json.loads((folder / MANIFEST).read_text())
    data = path.read_bytes()
    facts = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["files"][str(path.relative_to(folder))] = facts
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        return "[" * 100_000


# The doors.


def _resumed(what: str, target: Path, home: Path, is_honest: bool) -> Case:
    """A run that looks for what to go on from, as the driver does, and reads all of it."""
    rng = random.Random(what)
    resume = rng.choice(("auto", "auto", "auto", str(target.resolve())))
    chosen: list[Path] = []

    def action(config: RunConfig, _text: str) -> None:
        checkpoints = Path("checkpoints").resolve()
        found = find_checkpoint(config, checkpoints)
        job = _job(home)
        start = start_from(found, job.state, allowed=job.config.checkpoint.allow_changes)
        make_way(checkpoints, start)
        if start.checkpoint is not None:
            chosen.append(start.checkpoint)
            _read_all(start.checkpoint)

    def check(outcome: Outcome) -> list[str]:
        found = _gives_nothing_away()
        if outcome.code == 0 and chosen and is_honest:
            original = home / "checkpoints" / chosen[0].name
            if not original.exists() or _contents(original) != _contents(chosen[0]):
                found.append(f"goes on from {chosen[0].name}, which is damaged")
        return found

    return Case(
        what=f"resume={resume.rpartition('/')[2]} with {what}",
        values={**_values(home), "resume": resume},
        action=action,
        codes=CODES,
        names=("step_", "checkpoints"),
        check=check,
    )


def _converted(what: str, target: Path, home: Path, is_honest: bool) -> Case:
    """The converter, and what it wrote."""
    source = target if target.exists() else next(iter(sorted(Path("checkpoints").iterdir())))

    def check(outcome: Outcome) -> list[str]:
        found = _gives_nothing_away()
        made = _contents(Path("out"))
        if outcome.code != 0:
            return [*found, *(["a folder is left"] if made else [])]
        expected = _contents(home / "hf")
        weights = made.get("model.safetensors")
        if is_honest and made != expected:
            different = [n for n in made.keys() | expected.keys() if made.get(n) != expected.get(n)]
            found.append(f"converted to other {', '.join(sorted(different))}")
        if weights is None:
            found.append("no weights were written")
        if any(name.endswith((".py", ".pkl", ".bin", ".pt")) for name in made):
            found.append(f"code or pickles travel along: {sorted(made)}")
        if b"auto_map" in made.get("config.json", b"") + made.get("tokenizer_config.json", b""):
            found.append("auto_map travels along")
        return found

    return Case(
        what=f"convert {what}",
        program="roll_sft.convert.command",
        arguments=["--checkpoint", str(source), "--output", "out"],
        codes=CODES,
        names=("step_", "checkpoints", "--checkpoint"),
        check=check,
    )


def _gives_nothing_away() -> list[str]:
    found = ["the folder ran a command"] if Path("canary").exists() else []
    for path in Path("out").rglob("*"):
        if path.is_symlink():
            found.append(f"{path} is a link")
        elif path.is_file() and SECRET.encode() in path.read_bytes():
            found.append(f"{path} holds what lies outside of the checkpoint")
    return found


def _contents(folder: Path) -> dict[str, bytes]:
    names = (path for path in folder.rglob("*") if path.is_file() and path.name != "latest")
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


def _read_all(folder: Path) -> None:
    """Every tensor, as the ranks of a run read them."""
    index = read_index(folder)
    for key in sorted(index.keys):
        dtype, shape = index.stored(key)
        index.fill(Piece(key, shape, (0,) * len(shape), torch.empty(shape, dtype=dtype)))


def _values(home: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(home / "checkpoints" / STEP / ASSETS), "random_init": True},
        "data": {
            "train": [{"path": str(home / "rows.jsonl")}],
            "cache_dir": str(home / "cache"),
            "sequence_length": 200,
        },
        "train": {"max_steps": 4, "global_batch_size": 4},
        # What differs from the run that wrote them is not what is looked at here.
        "checkpoint": {
            "allow_changes": ["data", "tokenizer", "chat_template", "sequence_length",
                              "global_batch_size", "seed", "schedule", "optimizer"],
        },
        "tracking": {"backends": ["jsonl"]},
        "parallel": {"device": "cpu"},
    }  # fmt: skip


@functools.cache
def _job(home: Path) -> Job:
    return prepare_job(build_config(_values(home)))
