"""Reading safetensors folders, random weights, and writing folders that transformers loads."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from roll_sft.base.errors import CheckpointError, ConfigError
from roll_sft.convert.new_folder import new_folder
from roll_sft.models.families.qwen import QWEN2
from roll_sft.models.files.assets import TrainedTokenizer, save_assets
from roll_sft.models.files.model_folder import check_source
from roll_sft.models.files.safetensors_in import SafetensorsSource
from roll_sft.models.files.safetensors_out import plan_shards, write_hf_folder
from roll_sft.models.random_weights import RandomSource
from tests.tiny import tiny_tokenizer

CONFIG = {
    "vocab_size": 2053,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SHAPES = {"a": (8, 4), "b": (3,), "c": (2, 6)}
TENSORS = {name: torch.randn(shape) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(5)
    return Qwen2ForCausalLM(Qwen2Config(**CONFIG, eos_token_id=7)).to(torch.bfloat16)


@pytest.fixture(scope="module")
def model_folder(model: Qwen2ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source")
    model.save_pretrained(path, max_shard_size="300KB")
    return path


@pytest.fixture
def assets(tmp_path: Path) -> Path:
    path = tmp_path / "assets"
    (path / "additional_chat_templates").mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "qwen2", "torch_dtype": "float32"}')
    (path / "additional_chat_templates" / "rag.jinja").write_text("text")
    return path


# --- SafetensorsSource


@pytest.fixture(params=["one file", "shards"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """`TENSORS` in a folder, in either of the two forms."""
    if request.param == "one file":
        save_file(TENSORS, tmp_path / "model.safetensors")
        return tmp_path
    weight_map = {"a": "x.safetensors", "b": "y.safetensors", "c": "x.safetensors"}
    for file in set(weight_map.values()):
        part = {name: TENSORS[name] for name, where in weight_map.items() if where == file}
        save_file(part, tmp_path / file)
    index = json.dumps({"weight_map": weight_map})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    return tmp_path


def test_tensors_and_slices_are_read_as_they_were_stored(stored: Path):
    source = SafetensorsSource(stored)
    assert source.names() == SHAPES.keys()
    assert {name: source.shape(name) for name in SHAPES} == SHAPES
    for name, tensor in TENSORS.items():
        assert torch.equal(source.read(name), tensor)
    rows = source.read_slice("a", start=2, stop=5, dim=0)
    columns = source.read_slice("a", start=1, stop=3, dim=1)
    nothing = source.read_slice("a", start=8, stop=8, dim=0)
    assert torch.equal(rows, TENSORS["a"][2:5])
    assert torch.equal(columns, TENSORS["a"][:, 1:3])
    assert columns.is_contiguous()
    assert nothing.shape == (0, 4)
    del source
    assert torch.equal(rows, TENSORS["a"][2:5])


def test_a_folder_travels_by_its_path_also_when_its_files_are_mapped(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(stored.parent)
    source = SafetensorsSource(stored.name)
    source.read("a")
    sent = pickle.dumps(source)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(pickle.loads(sent).read("b"), TENSORS["b"])


def test_a_tensor_that_is_not_there_is_named(stored: Path):
    with pytest.raises(CheckpointError, match=f"'{stored}' has no tensor other among its 3"):
        SafetensorsSource(stored).read("other")


def test_a_missing_shard_is_named_at_once(model_folder: Path, tmp_path: Path):
    index = (model_folder / "model.safetensors.index.json").read_text()
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"\d+ of the shards.*\bmodel-00001-of"):
        SafetensorsSource(tmp_path)


def test_an_index_that_disagrees_with_its_shard_is_refused(tmp_path: Path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    index = json.dumps({"weight_map": {"d": "x.safetensors"}})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"\bd in x\.safetensors\b"):
        SafetensorsSource(tmp_path).read("d")


@pytest.mark.parametrize("text", ["{broken", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_refused(tmp_path: Path, text: str):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json\b"):
        SafetensorsSource(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match=r"model\.safetensors\b.*damaged"):
        SafetensorsSource(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin"):
        SafetensorsSource(tmp_path)


def test_a_folder_without_weights_is_refused_with_the_remedy(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"model\.random_init=true"):
        SafetensorsSource(tmp_path)
    with pytest.raises(ConfigError, match=r"^model\.path: '"):
        SafetensorsSource(tmp_path / "absent")


# --- RandomSource


def test_random_slices_equal_the_slice_of_the_whole_tensor():
    source = RandomSource({"w": (6, 4)}, seed=1, initializer_range=0.5)
    whole = source.read("w")
    assert torch.equal(source.read_slice("w", start=2, stop=5, dim=0), whole[2:5])
    columns = source.read_slice("w", start=1, stop=3, dim=1)
    assert torch.equal(columns, whole[:, 1:3])
    assert columns.is_contiguous()


def test_random_weights_depend_on_seed_and_name_alone():
    shapes = {"v": (6, 4), "w": (6, 4)}
    first = RandomSource(shapes, seed=1, initializer_range=0.5)
    again = RandomSource({"w": (6, 4)}, seed=1, initializer_range=0.5)
    torch.manual_seed(9)
    assert torch.equal(first.read("w"), again.read("w"))
    assert not torch.equal(first.read("w"), first.read("v"))
    other = RandomSource(shapes, seed=2, initializer_range=0.5)
    assert not torch.equal(first.read("w"), other.read("w"))


def test_random_norms_are_one_biases_zero_and_weights_normal():
    shape = QWEN2.shape(Qwen2Config(**CONFIG))
    source = RandomSource(QWEN2.hf_shapes(shape), seed=1, initializer_range=0.5)
    check_source(QWEN2, shape, source=source)
    assert source.read("model.norm.weight").eq(1).all()
    assert source.read("model.layers.0.input_layernorm.weight").eq(1).all()
    assert source.read("model.layers.0.self_attn.q_proj.bias").eq(0).all()
    weight = source.read("model.embed_tokens.weight")
    assert weight.dtype == torch.float32
    assert weight.std().item() == pytest.approx(0.5, rel=0.01)
    assert weight.mean().item() == pytest.approx(0.0, abs=0.01)


# --- writing


def test_shards_fill_in_order_up_to_the_limit():
    shapes = {"a": (10,), "b": (10,), "c": (30,), "d": (5,), "e": (5,)}
    plan = plan_shards(shapes, dtype=torch.bfloat16, max_shard_bytes=40)
    assert dict(plan.shards) == {
        "model-00001-of-00003.safetensors": ("a", "b"),
        "model-00002-of-00003.safetensors": ("c",),
        "model-00003-of-00003.safetensors": ("d", "e"),
    }
    plan = plan_shards(shapes, dtype=torch.bfloat16)
    assert dict(plan.shards) == {"model.safetensors": ("a", "b", "c", "d", "e")}


@pytest.mark.parametrize("max_shard_bytes", [300_000, 5_000_000_000])
def test_an_exported_folder_loads_in_transformers_and_is_equal(
    model: Qwen2ForCausalLM, model_folder: Path, tmp_path: Path, max_shard_bytes: int
):
    shapes = QWEN2.hf_shapes(QWEN2.shape(model.config))
    source = SafetensorsSource(model_folder)
    trained = TrainedTokenizer(tiny_tokenizer(), folder=model_folder, end_of_turn_id=2)
    save_assets(model_folder, trained=trained, output=tmp_path / "assets")
    folder = tmp_path / "hf"
    folder.mkdir()
    write_hf_folder(
        ((name, source.read(name).float()) for name in shapes),
        plan=plan_shards(shapes, dtype=torch.bfloat16, max_shard_bytes=max_shard_bytes),
        assets=tmp_path / "assets",
        folder=folder,
    )
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (max_shard_bytes < 1_000_000)
    if index.exists():
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == 2 * model.num_parameters()
        assert content["weight_map"].keys() == shapes.keys()
        assert {(folder / file).is_file() for file in content["weight_map"].values()} == {True}
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    for (name, ours), theirs in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == tiny_tokenizer().chat_template


def write(assets: Path, output: Path, *, tensors: Any = None, replace: bool = False) -> None:
    stream: Iterator[tuple[str, torch.Tensor]] = iter(tensors or TENSORS.items())
    plan = plan_shards(SHAPES, dtype=torch.float32, max_shard_bytes=150)
    with new_folder(output, kind="model", marker="config.json", replace=replace) as folder:
        write_hf_folder(stream, plan=plan, assets=assets, folder=folder)


def test_files_are_as_readable_as_any_new_file(assets: Path, tmp_path: Path):
    assets.chmod(0o700)
    write(assets, tmp_path / "deep" / "hf")
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "hf"]
    (tmp_path / "deep" / "hf").rename(tmp_path / "hf")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "hf").iterdir() if path.is_file()}
    assert modes == {(tmp_path / "plain" / "file").stat().st_mode}
    assert (tmp_path / "hf").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "hf" / "additional_chat_templates" / "rag.jinja").read_text() == "text"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        ({}, {"torch_dtype": "bfloat16"}),
    ],
)
def test_the_exported_dtype_is_written_under_the_key_that_all_versions_read(
    assets: Path, tmp_path: Path, written: dict[str, str], expected: dict[str, str]
):
    (assets / "config.json").write_text(json.dumps(written))
    plan = plan_shards(SHAPES, dtype=torch.bfloat16)
    (tmp_path / "hf").mkdir()
    write_hf_folder(TENSORS.items(), plan=plan, assets=assets, folder=tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == expected
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(stored[name], TENSORS[name].bfloat16()) for name in SHAPES)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("a", TENSORS["a"])], "b is due but nothing comes"),
        ([("a", TENSORS["a"]), ("c", TENSORS["c"])], "b is due but c comes"),
        ([*TENSORS.items(), ("a", TENSORS["a"])], "a comes after the last of 3"),
        ([("a", TENSORS["a"][:4])], r"a has shape \[4, 4\] but the model gives \[8, 4\]"),
    ],
    ids=["missing", "other", "extra", "shape"],
)
def test_an_export_without_exactly_the_planned_tensors_leaves_nothing(
    assets: Path, tmp_path: Path, tensors: Any, message: str
):
    with pytest.raises(CheckpointError, match=message):
        write(assets, tmp_path / "hf", tensors=tensors)
    assert list(tmp_path.iterdir()) == [assets]


def test_a_folder_that_is_in_the_way_is_refused_before_anything_is_read(
    assets: Path, tmp_path: Path
):
    output = tmp_path / "hf"
    output.write_text("")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        write(assets, output, tensors=[])
    output.unlink()
    output.mkdir()
    write(assets, output)
    with pytest.raises(CheckpointError, match=f"{output}\\b"):
        write(assets, output, tensors=[])


def test_replace_takes_the_place_of_an_earlier_model_only(assets: Path, tmp_path: Path):
    output = tmp_path / "hf"
    write(assets, output)
    (output / "of the earlier model").touch()
    write(assets, output, replace=True)
    assert not (output / "of the earlier model").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "assets"}
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        write(assets, tmp_path, replace=True)


def test_a_failed_replacement_keeps_the_earlier_model(assets: Path, tmp_path: Path):
    output = tmp_path / "hf"
    write(assets, output)
    before = {path.name for path in output.iterdir()}
    with pytest.raises(CheckpointError):
        write(assets, output, tensors=[("a", TENSORS["a"])], replace=True)
    assert {path.name for path in output.iterdir()} == before


def test_what_a_killed_export_left_is_cleared(assets: Path, tmp_path: Path):
    (tmp_path / ".hf.partial").mkdir()
    (tmp_path / ".hf.partial" / "model-00009-of-00009.safetensors").touch()
    write(assets, tmp_path / "hf")
    assert not (tmp_path / "hf" / "model-00009-of-00009.safetensors").exists()
    assert not (tmp_path / ".hf.partial").exists()


def test_a_disk_that_refuses_is_one_line(assets: Path):
    with pytest.raises(CheckpointError, match=r"^/proc/hf: "):
        write(assets, Path("/proc/hf"))
