"""What a folder may hold in place of a tokenizer, and ids that a model has no row for."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from roll_sft.base.errors import ConfigError
from roll_sft.data.chat.tokenizer import NoTokenizerError, load_tokenizer
from tests.tiny import tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path, *, rows: int = 400) -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(str(folder), trust_remote_code=False, embedding_size=rows)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("tokenizer.json", "[]", r"tokenizer\.json holds \[\], not a JSON object"),
        ("tokenizer.json", "null", r"tokenizer\.json holds null, not"),
        ("tokenizer.json", "3", r"tokenizer\.json holds 3, not"),
        ("tokenizer.json", "", r"tokenizer\.json: Expecting value"),
        ("tokenizer.json", "{}", r"KeyError: "),
        ("tokenizer.json", "[" * 100_000, r"tokenizer\.json: maximum recursion depth"),
        ("tokenizer.json", "\x00", r"tokenizer\.json: Expecting value"),
        ("tokenizer_config.json", '"x"', r"tokenizer_config\.json holds 'x', not"),
        ("tokenizer_config.json", "null", r"tokenizer_config\.json holds null, not"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}', r"AttributeError: "),
        ("tokenizer_config.json", '{"eos_token": ["a"]}', r"TypeError: Special token eos_token"),
    ],
)
def test_damaged_files_are_named_in_one_line(
    folder: Path, name: str, content: str, expected: str
) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=rf"^model\.tokenizer_path: .* \({expected}") as info:
        load(folder)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("template", "shown"),
    [(3, "3"), ("{{ messages }}\ud83d", r"'\\ud83d'"), ({"default": "\udfff"}, r"'\\udfff'")],
)
def test_a_chat_template_that_is_no_text_is_refused(
    folder: Path, template: object, shown: str
) -> None:
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    with pytest.raises(ConfigError, match=rf"chat_template of .*{shown}"):
        load(folder)


def test_a_folder_without_tokenizer_and_no_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.tokenizer_path: .*none"):
        load(tmp_path / "none")
    for kind in ("qwen2", "llama"):  # transformers makes an empty tokenizer, or raises
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(NoTokenizerError, match=r"^model\.tokenizer_path: .*tokenizer\.json"):
            load(tmp_path)


def test_the_largest_id_must_have_a_row_in_the_embedding(folder: Path) -> None:
    assert len(load(folder, rows=400)) == 400
    with pytest.raises(ConfigError, match=r"\bid 399\b.*\b399 rows\b"):
        load(folder, rows=399)
    path = folder / "tokenizer.json"
    content: dict[str, Any] = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.__getitem__)
    vocabulary[last] = 900
    path.write_text(json.dumps(content))
    assert len(load(folder, rows=901)) == 400
    with pytest.raises(ConfigError, match=r"\bid 900\b.*\b500 rows\b"):
        load(folder, rows=500)
