"""Files of a model that are not what they should: refused in a line that names what is wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from roll_sft.base.errors import ConfigError
from roll_sft.config.schema import ModelConfig, RunConfig
from roll_sft.convert.from_hf import import_model
from roll_sft.job.in_process import prepare_job
from roll_sft.job.model import located
from tests.parity import parity_config, write_model, write_rows


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with model/ and rows.jsonl."""
    write_model(tmp_path / "model", num_layers=1)
    write_rows(tmp_path / "rows.jsonl", num_rows=2)
    return tmp_path


def refused(home: Path, *parts: str) -> None:
    """`prepare` raises, in one line, with all `parts`."""
    with pytest.raises(ConfigError) as found:
        prepare_job(parity_config(home, model={"path": str(home / "model"), "random_init": True}))
    assert "\n" not in str(found.value)
    for part in parts:
        assert part in str(found.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "null"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer_config.json", '"x"'),
        ("tokenizer_config.json", '{"model_max_length": {}}'),
        ("tokenizer_config.json", '{"tokenizer_class": ["x"]}'),
        ("tokenizer_config.json", '{"pad_token": false}'),
        ("special_tokens_map.json", "5"),
        ("added_tokens.json", "[1]"),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_is_refused(home: Path, name: str, text: str) -> None:
    (home / "model" / name).write_text(text)
    refused(home, "model.tokenizer_path", str(home / "model"), "give a folder with tokenizer.json")


def test_a_token_beyond_the_embedding_is_refused_where_the_vocabulary_has_a_gap(home: Path) -> None:
    path = home / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    special = dict(tokenizer["added_tokens"][0], content="<|far|>", id=900)
    tokenizer["added_tokens"].append(special)
    tokenizer["model"]["vocab"]["<|far|>"] = 900
    path.write_text(json.dumps(tokenizer))
    refused(home, "'<|far|>' the id 900", "embedding has 403 rows")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", 0),
        ("hidden_size", -64),
        ("hidden_size", 2**63),
        ("vocab_size", True),
        ("num_hidden_layers", 10**6),
        ("head_dim", 2**40),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", 0.0),
        ("rope_theta", 0),
        ("rope_theta", float("inf")),
        ("initializer_range", float("inf")),
        ("dtype", "int64"),
        ("pad_token_id", 403),
        ("max_position_embeddings", [[]]),
        ("layer_types", [{}]),
    ],
)
def test_a_configuration_that_nothing_can_be_built_of_is_refused(
    home: Path, key: str, value: Any
) -> None:
    path = home / "model" / "config.json"
    config = json.loads(path.read_text())
    config[key] = value
    if key == "rope_theta":
        config["rope_parameters"] = {"rope_type": "default", key: value}
    path.write_text(json.dumps(config))
    refused(home, "model.path", key)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"model_type": "qwen2", "dtype": "__class__"}'])
def test_a_configuration_that_transformers_fails_on_is_refused(home: Path, text: str) -> None:
    (home / "model" / "config.json").write_text(text)
    refused(home, "config.json", "correct the file")


def test_a_model_is_not_converted_with_a_file_that_its_export_cannot_read(home: Path) -> None:
    (home / "model" / "tokenizer_config.json").write_text("[")
    with pytest.raises(ConfigError, match=r"model/tokenizer_config\.json\b"):
        import_model(home / "model", home / "out", dtype=None, replace=False)
    assert not (home / "out").exists()


@pytest.mark.parametrize("key", ["model.path", "model.tokenizer_path"])
def test_code_of_the_hub_is_not_run(tmp_path: Path, key: str) -> None:
    (tmp_path / "here").mkdir()
    given = {"path": str(tmp_path / "here"), key.removeprefix("model."): "org/model"}
    config = RunConfig(model=ModelConfig(trust_remote_code=True, **given))
    with pytest.raises(ConfigError, match=rf"trust_remote_code: {re.escape(key)} 'org/model' is"):
        located(config)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_another_repository_is_not_run(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"auto_map": {"AutoModel": ["org/other--evil.Model", null]}}')
    config = RunConfig(model=ModelConfig(trust_remote_code=True, path=str(tmp_path)))
    with pytest.raises(ConfigError, match=rf"{re.escape(name)}: auto_map .*org/other--evil"):
        located(config)
    (tmp_path / name).write_text('{"auto_map": {"AutoModel": "evil.Model"}}')
    assert located(config)[0].model.path == str(tmp_path)
