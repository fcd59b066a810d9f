"""The named chat templates: who may use which, and that a file or a broken one is treated alike."""

import copy
from importlib import resources
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from roll_sft.base.errors import ConfigError
from roll_sft.data.chat.chat import ChatTokenizer
from roll_sft.data.chat.templates import NAMED, chat_template
from roll_sft.data.rows.conversation import Conversation, Message
from tests.tiny import CHATML_TEMPLATE, tiny_tokenizer

ROW = Conversation((Message("user", "q"), Message("assistant", "a")), row=0, line=1)


def test_every_named_template_is_shipped_and_no_other() -> None:
    folder = resources.files("roll_sft.data.chat").joinpath("templates")
    assert {Path(file.name).stem for file in folder.iterdir()} == set(NAMED)


def test_null_is_the_tokenizers_own_and_a_path_is_a_file(tmp_path: Path) -> None:
    assert chat_template(None, tiny_tokenizer()) is None
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML_TEMPLATE, encoding="utf-8")
    assert chat_template(str(path), tiny_tokenizer()) == CHATML_TEMPLATE


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("gemma", r"'gemma' needs <start_of_turn>, <end_of_turn> .* use chatml or qwen,"),
        ("llama-3", r"'llama-3' is no file and not one of alpaca, chatml, .*; give a Jinja file"),
    ],
)
def test_what_the_tokenizer_lacks_or_nobody_knows_is_refused(value: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"^data.chat_template: {expected}"):
        chat_template(value, tiny_tokenizer())


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"^data\.chat_template: .*UTF-8"):
        chat_template(str(path), tiny_tokenizer())


def test_a_tokenizer_without_eos_token_cannot_end_an_answer_with_it() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"'tulu'.*\beos_token\b.*\bchatml or qwen\b"):
        chat_template("tulu", tokenizer)


def test_a_named_template_begins_as_the_tokenizer_begins_a_text_and_only_once() -> None:
    tokenizer: PreTrainedTokenizerFast = copy.deepcopy(tiny_tokenizer())
    tokenizer.bos_token = "<|endoftext|>"
    without = ChatTokenizer(tokenizer, template=chat_template("simple_chat", tokenizer))
    assert tokenizer.decode(without.tokenize(ROW)[0].token_ids) == (
        "User: q\n\nAssistant: a<|im_end|>"
    )
    begins = copy.deepcopy(tokenizer)
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    chat = ChatTokenizer(begins, template=chat_template("simple_chat", begins))
    assert begins.decode(chat.tokenize(ROW)[0].token_ids) == (
        "<|endoftext|>User: q\n\nAssistant: a<|im_end|>"
    )
