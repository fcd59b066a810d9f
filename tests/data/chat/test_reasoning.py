"""Rows with reasoning, and without, under each way in which templates treat it.

The oracle is transformers: what comes before a supervised answer is its generation prompt, id by
id, and prompt and answer together are what it writes for the conversation up to that answer.
"""

import copy
import functools
import json
import random
from collections.abc import Mapping
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from roll_sft.data.chat.chat import ChatTokenizer
from roll_sft.data.chat.mask import supervised_runs
from roll_sft.data.chat.sample import TokenizedSample, UnusableRow
from roll_sft.data.rows.conversation import Conversation, Message, ToolCall
from tests.golden_chats import QWEN3_LIKE, golden_tokenizer, templates

_PROMPT = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
_OPENED = _PROMPT.replace("assistant\\n", "assistant\\n<think>\\n")
_CLOSED = _PROMPT.replace(
    "{%- endif %}",
    "{{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking }}"
    "{%- endif %}",
)
# Writes content as it stands, and drops the reasoning of all but the last message.
_STRIPS_HISTORY = """\
{%- for message in messages %}
    {%- set said = message.content if loop.last else message.content.split('</think>')[-1] %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ said ~ '<|im_end|>\\n' }}
{%- endfor %}
"""
# Writes content as it stands, whatever it is.
_WRITES_ALL = _STRIPS_HISTORY.replace("if loop.last else message.content.split('</think>')[-1]", "")
# Drops reasoning everywhere.
_STRIPS_ALL = _STRIPS_HISTORY.replace("if loop.last else message.content", "")[:0] + (
    "{%- for message in messages %}{{- '<|im_start|>' ~ message.role ~ '\\n' ~ "
    "message.content.split('</think>')[-1] ~ '<|im_end|>\\n' }}{%- endfor %}"
)
# Another word for the variable, and no line break in the block.
_THINKING_ASKED = (
    """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.last %}
        {{- '<think>' + (message.reasoning_content or '') if thinking else '' }}
        {{- '</think>' }}
    {%- endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
"""
    + "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' + ('<think>' if thinking else '</think>') }}{%- endif %}"
)

TEMPLATES = {
    "opens and writes": QWEN3_LIKE.replace(_PROMPT, _OPENED),
    "opens and strips history": _STRIPS_HISTORY + _OPENED,
    "opens and writes all": _WRITES_ALL + _OPENED,
    "hybrid": QWEN3_LIKE.replace(_PROMPT, _CLOSED),
    "hybrid strips history": _STRIPS_HISTORY + _CLOSED,
    "strips history": _STRIPS_HISTORY + _PROMPT,
    "asked by thinking": _THINKING_ASKED,
    "qwen": templates()["qwen"],
    "deepseek_r1": templates()["deepseek_r1"],
}
VARIABLES: dict[str, list[dict[str, Any]]] = {
    "hybrid": [{}, {"enable_thinking": True}, {"enable_thinking": False}],
    "hybrid strips history": [{}, {"enable_thinking": False}],
    "qwen": [{}, {"enable_thinking": False}],
    "asked by thinking": [{"thinking": True}, {"thinking": False}],
}
CASES = [(name, given) for name in TEMPLATES for given in VARIABLES.get(name, [{}])]
# Reasoning cannot be supervised where the generation prompt says that there is none.
CLOSED = ({"enable_thinking": False}, {"thinking": False})


@functools.cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(golden_tokenizer())
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>")])
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def random_row(seed: int, kinds: str) -> Conversation:
    """One to three questions; an answer keeps its reasoning as one of the letters says.

    "f": in a field, "i": in the content, "n": it has none.
    """
    rng, messages = random.Random(seed), []
    if rng.random() < 0.5:
        messages.append(Message("system", "Be brief."))
    for turn in range(rng.randint(1, 3)):
        messages.append(Message("user", f"What is {turn} + {rng.randint(0, 99)}?"))
        thought = rng.choice(["hm", "one\n\nand two", "x < y\nso {{z}}", "\u4f60\U0001f600"])
        said = rng.choice(["Four.", "It is 3.\n\nDone", "**\u597d**", "1\n"])
        kind, train = rng.choice(kinds), turn == 0 or rng.random() < 0.8
        if kind == "i":
            said = f"<think>\n{thought}\n</think>\n\n{said}"
        reasoning = thought if kind == "f" else ""
        messages.append(Message("assistant", said, reasoning=reasoning, train=train))
    return Conversation(tuple(messages), row=0, line=1)


def as_transformers(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    return [
        {"role": message.role, "content": message.content}
        | ({"reasoning_content": message.reasoning} if message.reasoning else {})
        for message in messages
    ]


def applied(name: str, turns: list[dict[str, Any]], given: Mapping[str, Any]) -> str:
    text = tokenizer_of(name).apply_chat_template(turns, tokenize=False, **given)
    assert isinstance(text, str)
    return text


def prompt_of(name: str, turns: list[dict[str, Any]], given: Mapping[str, Any]) -> list[int]:
    ids = tokenizer_of(name).apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False, **given
    )
    assert isinstance(ids, list)
    return ids


def tokenized(name: str, row: Conversation, given: Mapping[str, Any]) -> list[TokenizedSample]:
    return ChatTokenizer(tokenizer_of(name), variables=given).tokenize(row)


def written(name: str, sample: TokenizedSample) -> list[tuple[list[int], str, str]]:
    """For each supervised run: the ids before it, its text, and the text up to its end."""
    ids, decode = sample.token_ids.tolist(), tokenizer_of(name).decode
    return [
        (ids[:first], decode(ids[first : last + 1]), decode(ids[: last + 1]))
        for first, last in zip(*supervised_runs(sample), strict=True)
    ]


@pytest.mark.parametrize(("name", "given"), CASES)
def test_prompts_and_answers_are_those_of_transformers(name: str, given: dict[str, Any]) -> None:
    is_closed = given in CLOSED
    chat = ChatTokenizer(tokenizer_of(name), variables=given)
    for seed in range(40):
        row = random_row(seed, "n" if is_closed else "fin")
        supervised = [at for at, m in enumerate(row.messages) if m.role == "assistant" and m.train]
        found = [each for sample in chat.tokenize(row) for each in written(name, sample)]
        assert len(found) == len(supervised), seed
        for at, (prompt, answer, upto) in zip(supervised, found, strict=True):
            turns, message = as_transformers(row.messages[: at + 1]), row.messages[at]
            assert prompt == prompt_of(name, turns[:at], given), seed
            assert answer.endswith("<|im_end|>")
            for part in (message.reasoning, message.content.rpartition("</think>\n\n")[2]):
                assert part.strip() in answer, seed
            # What transformers writes for the row, or for it with its reasoning in the content.
            thought = f"<think>\n{message.reasoning}\n</think>\n\n"
            inline = {"role": "assistant", "content": thought + message.content}
            texts = [
                applied(name, turns, given),
                applied(name, [*turns[:at], inline], given),
            ]
            assert any(text.startswith(upto) for text in texts), seed


@pytest.mark.parametrize(("name", "given"), [case for case in CASES if case[1] in CLOSED])
def test_reasoning_after_a_prompt_that_closes_its_block_is_refused(
    name: str, given: dict[str, Any]
) -> None:
    row = Conversation(
        (Message("user", "q"), Message("assistant", "a", reasoning="hm")), row=0, line=1
    )
    with pytest.raises(UnusableRow, match="reasoning"):
        tokenized(name, row, given)


@pytest.mark.parametrize("name", ["opens and strips history", "opens and writes"])
def test_an_answer_that_was_recorded_after_an_open_block_is_given_its_beginning(name: str) -> None:
    row = Conversation(
        (Message("user", "q"), Message("assistant", "hm\n</think>\n\nOne.")), row=0, line=1
    )
    (sample,) = tokenized(name, row, {})
    ((prompt, answer, _),) = written(name, sample)
    assert prompt == prompt_of(name, as_transformers(row.messages[:1]), {})
    assert answer == "hm\n</think>\n\nOne.<|im_end|>"


def test_variables_of_a_row_win_over_those_of_the_run() -> None:
    name, message = "hybrid", Message("user", "q")
    rows = [
        Conversation((message, Message("assistant", "a")), row=0, line=1, template_kwargs=given)
        for given in ({}, {"enable_thinking": True}, {"enable_thinking": False}, {})
    ]
    chat = ChatTokenizer(tokenizer_of(name), variables={"enable_thinking": False})
    answers = []
    for row, result in zip(rows, chat.tokenize_many(rows), strict=True):
        assert not isinstance(result, UnusableRow)
        ((prompt, answer, _),) = written(name, result[0])
        given = {"enable_thinking": False, **row.template_kwargs}
        assert prompt == prompt_of(name, as_transformers(row.messages[:1]), given)
        answers.append(answer)
    block = "<think>\n\n</think>\n\n"
    assert answers == ["a<|im_end|>", f"{block}a<|im_end|>", "a<|im_end|>", "a<|im_end|>"]
    plain, other = (ChatTokenizer(tokenizer_of(name), variables=v) for v in ({}, {"day": "1"}))
    assert len({chat.fingerprint, plain.fingerprint, other.fingerprint}) == 3


def test_what_training_decides_is_no_variable_of_a_row() -> None:
    row = random_row(0, "n")
    asked = Conversation(
        row.messages, row=0, line=1, template_kwargs={"add_generation_prompt": True}
    )
    with pytest.raises(UnusableRow, match="'add_generation_prompt'"):
        tokenized("hybrid", asked, {})


def test_a_template_that_strips_all_reasoning_names_one_that_does_not() -> None:
    tokenizer = copy.deepcopy(tokenizer_of("hybrid"))
    tokenizer.chat_template = _STRIPS_ALL + _OPENED
    for kind in "fin":
        row = random_row(1, kind)
        (result,) = ChatTokenizer(tokenizer).tokenize_many([row])
        assert isinstance(result, UnusableRow)
        named = str(result).partition("use data.chat_template=")[2].partition(", or a Jinja")[0]
        for name in named.replace(" or ", ", ").split(", "):
            assert ChatTokenizer(tokenizer, template=templates()[name]).tokenize(row)


def test_a_block_of_reasoning_and_calls_is_supervised_with_its_call() -> None:
    call = Message("assistant", "", reasoning="add them", tool_calls=(ToolCall("add", {"a": "x"}),))
    row = Conversation((Message("user", "q"), call), row=0, line=1)
    (sample,) = tokenized("opens and writes", row, {})
    ((_, answer, _),) = written("opens and writes", sample)
    assert answer.startswith("add them\n</think>\n\n")
    assert json.dumps({"a": "x"}) in answer
    assert answer.endswith("</tool_call><|im_end|>")
