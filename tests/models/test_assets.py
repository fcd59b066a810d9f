"""What is kept beside the weights: the source's files as they are, and what training changed."""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from roll_sft.base.errors import ConfigError
from roll_sft.models.files.assets import TrainedTokenizer, asset_files, save_assets
from roll_sft.models.files.readers import widen
from tests.models.helpers import LLAMA3_ROPE
from tests.tiny import tiny_tokenizer

# As transformers 4 writes it, by an author with habits of his own.
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "additional_special_tokens": ["<|im_start|>"],
    "chat_template": "{{ messages[0].content }}",
    "bos_token": None,
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "eos_token_id": 7}))
    tiny_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=5))
    (folder / "special_tokens_map.json").write_text("{}  ")
    (folder / "tokenizer.model").write_bytes(b"\x00 sentencepiece")
    (folder / "LICENSE").write_text("as you like")
    (folder / "README.md").write_text("---\nlicense: mit\n---")
    for name in ("evil.py", "model.safetensors", "training_args.bin", "notes.json", ".env"):
        (folder / name).write_text("no asset")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    return folder


def trained_of(source: Path, **options: Any) -> TrainedTokenizer:
    tokenizer = AutoTokenizer.from_pretrained(source)
    return TrainedTokenizer(tokenizer, folder=source, end_of_turn_id=6, **options)


def test_files_that_training_did_not_change_are_the_source_s_own(
    source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    save_assets(source, trained=trained_of(source), output=output)
    names = {*asset_files(source)}
    assert {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()} == {
        *names, "generation_config.json",
    }  # fmt: skip
    assert names.isdisjoint(["evil.py", "model.safetensors", "training_args.bin", "notes.json"])
    widen(output)
    for name in names - {"config.json"}:
        assert (output / name).read_bytes() == (source / name).read_bytes(), name
    assert json.loads((output / "config.json").read_text()) == {
        "model_type": "qwen2", "eos_token_id": 7,
    }  # fmt: skip


def test_a_given_template_takes_the_place_of_all_others(source: Path, tmp_path: Path) -> None:
    output, template = tmp_path / "out", "{# mine #}{{ messages }}"
    save_assets(source, trained=trained_of(source, chat_template=template), output=output)
    assert (output / "chat_template.jinja").read_text() == template
    assert not (output / "additional_chat_templates" / "tool_use.jinja").exists()
    config = json.loads((output / "tokenizer_config.json").read_text())
    assert config == {**TOKENIZER_CONFIG, "chat_template": template}
    assert [*config] == [*TOKENIZER_CONFIG]
    assert AutoTokenizer.from_pretrained(output).chat_template == template
    for name in ("tokenizer.json", "special_tokens_map.json", "tokenizer.model"):
        assert (output / name).read_bytes() == (source / name).read_bytes(), name


def test_a_source_of_transformers_5_gets_the_names_of_4(source: Path, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    for name in ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"):
        (source / name).unlink()
    tokenizer.save_pretrained(source)
    (source / "config.json").write_text(
        json.dumps(
            {
                "model_type": "qwen2",
                "auto_map": {"AutoModel": "evil.Model"},
                "rope_parameters": LLAMA3_ROPE,
            }
        )
    )
    output = tmp_path / "out"
    save_assets(source, trained=trained_of(source), output=output)
    widen(output)
    config = json.loads((output / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|im_start|>"]
    assert config.keys().isdisjoint(["backend", "is_local", "extra_special_tokens"])
    assert {each["name"]: each["template"] for each in config["chat_template"]} == {
        "default": tokenizer.chat_template,
        "tool_use": "tools",
    }
    model = json.loads((output / "config.json").read_text())
    assert {"rope_theta": model["rope_theta"], **model["rope_scaling"]} == LLAMA3_ROPE
    assert "rope_theta" not in model["rope_scaling"]
    assert "auto_map" not in model
    again = {path: path.read_bytes() for path in output.iterdir() if path.is_file()}
    widen(output)
    assert again == {path: path.read_bytes() for path in again}


def test_files_that_the_source_lacks_are_made(source: Path, tmp_path: Path) -> None:
    """A tokenizer that is sentencepiece's file and nothing else, or has no configuration."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    trained = TrainedTokenizer(tiny_tokenizer(), folder=source, end_of_turn_id=6)
    save_assets(source, trained=trained, output=tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("It's 12")["input_ids"] == tiny_tokenizer()("It's 12")["input_ids"]
    assert loaded.eos_token == "<|im_end|>"


def test_the_rules_that_trained_replace_a_file_that_has_others(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = json.loads((source / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"].pop(0)  # words are no longer split
    (source / "tokenizer.json").write_text(json.dumps(content))
    trained = TrainedTokenizer(tiny_tokenizer(), folder=source, end_of_turn_id=6)
    save_assets(source, trained=trained, output=tmp_path / "out")
    assert "tokenizer.json of the source splits text differently" in caplog.text
    exported = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "out" / "tokenizer.json"))
    text = "two words, 1234 and\n\n more"
    assert exported(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"eos_token_id": [9, 2], "top_p": 0.5}, {"eos_token_id": [6, 2, 9], "top_p": 0.5}),
        ({"eos_token_id": 9}, {"eos_token_id": [6, 2, 9]}),
        ({"pad_token_id": 4}, {"eos_token_id": [6, 2]}),
    ],
)
def test_generation_stops_at_the_end_of_turn_and_keeps_what_the_author_set(
    source: Path, tmp_path: Path, written: dict[str, Any], expected: dict[str, Any]
) -> None:
    (source / "generation_config.json").write_text(json.dumps(written))
    save_assets(source, trained=trained_of(source), output=tmp_path / "out")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {**expected, "pad_token_id": 0}


def test_a_generation_configuration_is_made_where_the_source_has_none(
    source: Path, tmp_path: Path
) -> None:
    save_assets(source, trained=trained_of(source), output=tmp_path / "out")
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == [6, 2, 7]  # end of turn, tokenizer's, config.json's
    assert generation.pad_token_id == 0
    assert "_from_model_config" not in (tmp_path / "out" / "generation_config.json").read_text()


def test_assets_need_a_configuration(source: Path, tmp_path: Path) -> None:
    trained = trained_of(source)
    (source / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config\.json\b.*\blist\b"):
        save_assets(source, trained=trained, output=tmp_path / "out")


@pytest.mark.parametrize("stop", [{"a": 1}, [[1]], True, "</s>", 1.5])
def test_a_stop_that_is_no_token_is_refused(source: Path, tmp_path: Path, stop: object) -> None:
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    value = re.escape(repr(stop)) if stop is not True else "true"
    with pytest.raises(ConfigError, match=rf"generation_config\.json: eos_token_id {value} "):
        save_assets(source, trained=trained_of(source), output=tmp_path / "out")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_number_that_is_not_finite_is_refused_with_its_key(
    source: Path, tmp_path: Path, name: str
) -> None:
    trained = trained_of(source)
    path = source / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, "of": {"an": [1.5, math.inf]}}))
    with pytest.raises(ConfigError, match=rf"{re.escape(name)}: of\.an\[1\] inf "):
        save_assets(source, trained=trained, output=tmp_path / "out")


def test_half_a_surrogate_pair_survives(source: Path, tmp_path: Path) -> None:
    trained = trained_of(source)
    odd = {"\udfff": "a \ud83d b", "name": "\u540d \U0001f98a"}
    for name in ("config.json", "generation_config.json"):
        path = source / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, **odd}))
    save_assets(source, trained=trained, output=tmp_path / "out")
    widen(tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert json.loads(text).items() >= odd.items()
        assert odd["name"] in text
