"""What a conversion refuses, in either direction: damaged, ruined and hostile folders.

In this process and without ranks: checkpoints are converted models that are given a step.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from roll_sft.convert import command
from tests import parity
from tests.checkpoint.test_manifest import change

SHARD, INDEX, MANIFEST = "__0_0.distcp", "index.json", "manifest.json"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, and of it `run/checkpoints/step_00000002` and `..4`."""
    home = tmp_path_factory.mktemp("refused")
    parity.write_model(home / "model", num_layers=1)
    first = home / "run" / "checkpoints" / "step_00000002"
    assert command.main([str(home / "model"), "--output", str(first)]) == 0
    change(first / MANIFEST, "step", 2)
    shutil.copytree(first, first.with_name("step_00000004"))
    change(first.with_name("step_00000004") / MANIFEST, "step", 4)
    return home


@pytest.fixture
def checkpoint(home: Path, tmp_path: Path) -> Path:
    """A step folder to spoil, with an earlier one beside it."""
    shutil.copytree(home / "run", tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / "step_00000004"


@pytest.fixture
def model(home: Path, tmp_path: Path) -> Path:
    shutil.copytree(home / "model", tmp_path / "model")
    return tmp_path / "model"


def refusal(
    source: Path, capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 6
) -> str:
    """The one line that the conversion of `source` ends with; it leaves nothing."""
    output = source.parent / "made"
    capsys.readouterr()
    assert command.main([str(source), "--output", str(output), *arguments]) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert not output.exists()
    assert not [*source.parent.glob(".made*")]
    return error.strip().splitlines()[-1]


def poison(folder: Path, *, sign: bool = True) -> None:
    """Write a NaN into a weight of a checkpoint; sign it, as a run that diverged would."""
    chunks = json.loads((folder / INDEX).read_text())["tensors"]["decoder.final_layernorm.weight"]
    start = chunks["chunks"][0][5]
    content = bytearray((folder / SHARD).read_bytes())
    content[start : start + 4] = torch.tensor([torch.nan]).numpy().tobytes()
    (folder / SHARD).write_bytes(content)
    if sign:
        digest = hashlib.sha256(content).hexdigest()
        change(folder / MANIFEST, f"files|{SHARD}|sha256", digest)


def test_a_run_that_diverged_is_not_exported_and_the_way_back_is_named(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(checkpoint)
    line = refusal(checkpoint, capsys, code=5)
    good = checkpoint.with_name("step_00000002")
    assert "model.norm.weight (1 of 64 numbers) is NaN or infinite" in line
    assert f"the last with finite weights is step_00000002: go back with resume={good}" in line
    poison(good)
    assert "no earlier checkpoint beside it is finite" in refusal(checkpoint, capsys, code=5)
    change(checkpoint / MANIFEST, "step", 0)
    untrained = checkpoint.rename(checkpoint.with_name("converted"))
    assert "as it was in the model that this" in refusal(untrained, capsys, code=6)


@pytest.mark.parametrize("name", [SHARD, INDEX, "hf_assets/config.json", ".metadata"])
def test_every_file_is_checked_without_being_asked(
    name: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert f"{path}: its SHA-256 is" in refusal(checkpoint, capsys)


def test_damage_is_not_taken_for_divergence(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(checkpoint, sign=False)
    assert f"{SHARD}: its SHA-256 is" in refusal(checkpoint, capsys)


def link_out(path: Path) -> None:
    secret = path.parents[1] / "secret"
    secret.write_text("{}")
    path.unlink(missing_ok=True)
    path.symlink_to(secret)


PLANTS: dict[str, Callable[[Path], object]] = {
    "is not in the manifest": lambda assets: (assets / "vocab.json").write_text("{}"),
    "vocab.json: is a link": lambda assets: link_out(assets / "vocab.json"),
    "tokenizer.json: is a link": lambda assets: link_out(assets / "tokenizer.json"),
}


@pytest.mark.parametrize("expected", PLANTS)
def test_what_was_planted_in_a_checkpoint_reaches_no_export(
    expected: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PLANTS[expected](checkpoint / "hf_assets")
    assert expected in refusal(checkpoint, capsys)


def test_code_is_part_of_no_export(model: Path, tmp_path: Path) -> None:
    """Neither of a model's folder, nor of a checkpoint that lists it."""
    (model / "evil.py").write_text("raise SystemExit(9)")
    for name in ("config.json", "tokenizer_config.json"):
        change(model / name, "auto_map", {"AutoTokenizer": ["evil.T", None], "AutoModel": "evil.M"})
    made, back = tmp_path / "step_00000000", tmp_path / "back"
    assert command.main([str(model), "--output", str(made)]) == 0
    assert not [*made.rglob("*.py")]
    (made / "hf_assets" / "evil.py").write_text("raise SystemExit(9)")
    listed = {"size": 19, "sha256": hashlib.sha256(b"raise SystemExit(9)").hexdigest()}
    change(made / MANIFEST, "files|hf_assets/evil.py", listed)
    assert command.main([str(made), "--output", str(back)]) == 0
    assert not [*back.rglob("*.py")]
    for path in back.glob("*.json"):
        assert "evil" not in path.read_text()


@pytest.mark.parametrize(
    ("written", "arguments", "expected"),
    [
        ("float32", [], "dtype fp32, the source model's"),
        ("bfloat16", [], "dtype bf16, the source model's, rounded once from the fp32 weights"),
        (..., [], "dtype fp32, for the source's config.json names none"),
        ("float64", [], "dtype fp32, for the source's config.json names none"),
        ("bfloat16", ["--dtype", "fp16"], "dtype fp16, as asked for"),
    ],
)
def test_the_dtype_of_an_export_is_said_with_its_reason(
    written: Any,
    arguments: list[str],
    expected: str,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = checkpoint / "hf_assets" / "config.json"
    change(config, "dtype", written)
    sign(checkpoint, "hf_assets/config.json")
    assert command.main([str(checkpoint), "--output", str(checkpoint / "out"), *arguments]) == 0
    assert capsys.readouterr().out.startswith(expected)


def sign(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    facts = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change(folder / MANIFEST, f"files|{name}", facts)


# Models


def edit_tensors(model: Path, **changes: Any) -> None:
    tensors = load_file(model / "model.safetensors")
    for name, edit in changes.items():
        found = next(each for each in tensors if each.endswith(name.replace("__", ".")))
        tensors[found] = edit(tensors[found])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def fill_last(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def edit(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return edit


def test_a_ruined_model_is_named_by_its_tensor(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_tensors(model, up_proj__weight=fill_last(float("inf")))
    line = refusal(model, capsys)
    assert f"{model}: model.layers.0.mlp.up_proj.weight (1 of 10,240 numbers) is NaN" in line


def test_numbers_that_a_dtype_does_not_reach_are_refused_in_both_directions(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_tensors(model, q_proj__weight=fill_last(1e6))
    expected = "holds 1e+06, and float16 ends at 6.55e+04; take bf16 or fp32"
    assert expected in refusal(model, capsys, "--dtype", "fp16", code=2)
    checkpoint = tmp_path / "checkpoints" / "step_00000000"
    assert command.main([str(model), "--output", str(checkpoint)]) == 0
    assert expected in refusal(checkpoint, capsys, "--dtype", "fp16", code=2)


def index_out(model: Path, file: Any) -> None:
    names = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "x.safetensors")
    weight_map = {**dict.fromkeys(names, "x.safetensors"), "model.norm.weight": file}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


HEADER = b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'
HOSTILE: dict[str, tuple[Callable[[Path], object], int]] = {
    "is no safetensors file of this folder": (lambda m: index_out(m, "../model/x.safetensors"), 6),
    "puts model.norm.weight in '/etc/hosts'": (lambda m: index_out(m, "/etc/hosts"), 6),
    "puts model.norm.weight in 'config.json'": (lambda m: index_out(m, "config.json"), 6),
    "in I64, and it is read in F32": (
        lambda m: edit_tensors(m, model__norm__weight=lambda tensor: tensor.long()), 2
    ),
    "model.safetensors is damaged": (
        lambda m: (m / "model.safetensors").write_bytes(len(HEADER).to_bytes(8, "little") + HEADER),
        6,
    ),
    "is damaged (": (lambda m: (m / "model.safetensors").write_bytes(b"\xff" * 64), 6),
    "is not an index of shards": (
        lambda m: (
            (m / "model.safetensors").unlink(),
            (m / "model.safetensors.index.json").write_text("[" * 100_000),
        ),
        6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_file_beside_the_weights_that_cannot_be_read_is_named_in_both_directions(
    name: str, model: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (model, checkpoint / "hf_assets"):
        (folder / name).write_bytes(b"{\xff")
    sign(checkpoint, f"hf_assets/{name}")
    assert f"{model / name} cannot be read as" in refusal(model, capsys, code=2)
    line = refusal(checkpoint, capsys, code=2)
    assert f"{checkpoint / 'hf_assets' / name} cannot be read as" in line


@pytest.mark.parametrize("expected", HOSTILE)
def test_a_hostile_model_is_one_line(
    expected: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, code = HOSTILE[expected]
    spoil(model)
    assert expected in refusal(model, capsys, code=code)


def test_layers_of_different_dtypes_lose_nothing(tmp_path: Path) -> None:
    model = parity.write_model(tmp_path / "model", num_layers=2)
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if ".layers.0." not in name:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert command.main([str(model), "--output", str(tmp_path / "step_00000000")]) == 0
    arguments = [str(tmp_path / "step_00000000"), "--output", str(tmp_path / "back")]
    assert command.main(arguments) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(back[name].to(tensor.dtype), tensor), name
