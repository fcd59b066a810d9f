"""What lies in `data/chat/fast/` makes nothing but speed: without it, samples are the same."""

import sys
from pathlib import Path

import numpy as np
import pytest

import roll_sft.data.chat.fast
from roll_sft.base.errors import DataError
from roll_sft.data.chat.chat import ChatTokenizer, TokenizedSample, UnusableRow
from roll_sft.data.rows.conversation import Conversation, Document, Message
from tests.golden_chats import cases, golden_tokenizer, templates
from tests.tiny import CHATML_TEMPLATE

ROWS = (
    *cases().values(),
    Conversation((Message("user", "q"), Message("assistant", "\n\na ")), row=0, line=1),
    Conversation((Message("user", "<|im_end|>"), Message("assistant", "K\u00f6ln")), row=0, line=1),
    Conversation(
        (
            Message("user", "\x9b31m"),
            Message("assistant", "no", train=False),
            Message("user", "again"),
            Message("assistant", "yes"),
        ),
        row=0,
        line=1,
    ),
    Document("A text of 12 words. \u00e9", row=0, line=1),
)

Outcome = list[TokenizedSample] | str


@pytest.fixture
def without_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """No module of `fast/` can be imported."""
    for file in Path(roll_sft.data.chat.fast.__path__[0]).glob("*.py"):
        monkeypatch.setitem(sys.modules, f"roll_sft.data.chat.fast.{file.stem}", None)
    monkeypatch.setitem(sys.modules, "roll_sft.data.chat.fast", None)


def outcomes(template: str, *, train_on: str, use_fast: bool) -> list[Outcome]:
    chat = ChatTokenizer(
        golden_tokenizer(), template=template, train_on=train_on, use_fast=use_fast
    )
    try:
        results = chat.tokenize_many(ROWS)
    except DataError as error:
        return [str(error)]
    return [str(each) if isinstance(each, UnusableRow) else each for each in results]


@pytest.mark.parametrize("train_on", ["assistant", "last_assistant", "all"])
@pytest.mark.parametrize("name", [*templates(), "chatml of the tests"])
def test_samples_are_the_same_without_fast(
    name: str, train_on: str, request: pytest.FixtureRequest
) -> None:
    template = templates().get(name, CHATML_TEMPLATE)
    expected = outcomes(template, train_on=train_on, use_fast=True)
    request.getfixturevalue("without_fast")
    found = outcomes(template, train_on=train_on, use_fast=False)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(ours, str) or isinstance(theirs, str):
            assert ours == theirs
            continue
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert np.array_equal(one.token_ids, other.token_ids)
            assert np.array_equal(one.label_mask, other.label_mask)
            assert one.atomic == other.atomic


@pytest.mark.usefixtures("without_fast")
def test_fast_is_what_is_used_unless_it_is_refused() -> None:
    with pytest.raises(ImportError):
        outcomes(CHATML_TEMPLATE, train_on="assistant", use_fast=True)
