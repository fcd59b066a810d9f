"""Every template, id by id: against files, against transformers, and one way against the other."""

import functools
import json
import pickle
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from roll_sft.data.chat.chat import ChatTokenizer, TokenizedSample, UnusableRow
from roll_sft.data.chat.mask import supervised_runs
from roll_sft.data.rows.conversation import Conversation, Message
from tests.golden_chats import (
    PATH,
    QWEN3_LIKE,
    cases,
    conversation,
    golden,
    golden_tokenizer,
    templates,
)

TEMPLATES = templates()
# ChatML as it is published for other trainers: answers are marked, without their end of turn.
TEMPLATES["marked"] = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content }}{%- endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
GOLDEN: dict[str, Any] = json.loads(PATH.read_text())
WITHOUT_TOOLS = (
    "alpaca",
    "chatml",
    "deepseek_r1",
    "gemma",
    "simple_chat",
    "tulu",
    "vicuna",
    "zephyr",
)
# Without the same control tokens around every answer, its place is found in the text.
BY_PLACES_ONLY = ("alpaca", "deepseek_r1", "simple_chat", "tulu", "vicuna")


@functools.cache
def chat_of(name: str, *, quick: bool = True, train_on: str = "assistant") -> ChatTokenizer:
    """With `quick=False` every row is proved and nothing is read off the ids."""
    chat = ChatTokenizer(
        golden_tokenizer(), template=TEMPLATES[name], train_on=train_on, use_fast=quick
    )
    if quick:
        prepared = chat.prepared_for(cases()["single"])
        assert (prepared.markers is None) == (name in BY_PLACES_ONLY)
    return chat


def as_transformers(row: Conversation) -> list[dict[str, Any]]:
    messages = []
    for message in row.messages:
        given: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning:
            given["reasoning_content"] = message.reasoning
        if message.tool_calls:
            given["tool_calls"] = [
                {
                    "type": "function",
                    "id": call.id,
                    "function": {"name": call.name, "arguments": dict(call.arguments)},
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id:
            given |= {"name": message.name, "tool_call_id": message.tool_call_id}
        messages.append(given)
    return messages


def applied(name: str, row: Conversation, *, upto: int | None = None) -> list[int]:
    """What transformers makes of a row, or of its first messages with the generation prompt."""
    ids = golden_tokenizer().apply_chat_template(
        as_transformers(row)[:upto],
        chat_template=TEMPLATES[name],
        tools=list(row.tools) or None,
        add_generation_prompt=upto is not None,
        return_dict=False,
    )
    assert isinstance(ids, list)
    return ids


def comparable(result: list[TokenizedSample] | UnusableRow) -> object:
    if isinstance(result, UnusableRow):  # the remedy tries all templates; golden files hold it
        return result.args, result.is_of_template
    return [(s.token_ids.tolist(), s.label_mask.tolist(), s.atomic) for s in result]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "marked"])
def test_samples_are_the_golden_ones(name: str) -> None:
    chat = chat_of(name)
    for case, row in cases().items():
        assert golden(chat, row) == GOLDEN[f"{name}/{case}"], case


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_prompts_are_those_of_transformers(name: str) -> None:
    for case in ("single", "multi", "untrained", "tools", "reasoning"):
        row = cases()[case]
        (samples,) = chat_of(name).tokenize_many([row])
        if isinstance(samples, UnusableRow):
            assert case in ("tools", "reasoning")
            assert case == "reasoning" or name in (*WITHOUT_TOOLS, "marked")
            continue
        answers = [
            index
            for index, message in enumerate(row.messages)
            if message.role == "assistant" and message.train
        ]
        if len(samples) == 1 and name != "deepseek_r1":  # see tests/data/chat/test_reasoning.py
            assert samples[0].token_ids.tolist() == applied(name, row)
        prompts = [
            sample.token_ids[:first].tolist()
            for sample in samples
            for first in supervised_runs(sample)[0]
        ]
        assert prompts == [applied(name, row, upto=index) for index in answers]


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_places_say_the_same(name: str) -> None:
    rows = list(cases().values())
    for train_on in ("assistant", "last_assistant", "all"):
        quick = chat_of(name, train_on=train_on).tokenize_many(rows)
        proved = chat_of(name, quick=False, train_on=train_on).tokenize_many(rows)
        assert list(map(comparable, quick)) == list(map(comparable, proved))


def test_a_tokenizer_travels_as_its_recipe() -> None:
    chat = chat_of("qwen3", train_on="last_assistant")
    copied = pickle.loads(pickle.dumps(chat))
    assert (copied.fingerprint, copied.template) == (chat.fingerprint, QWEN3_LIKE)
    rows = list(cases().values())
    assert list(map(comparable, copied.tokenize_many(rows))) == list(
        map(comparable, chat.tokenize_many(rows))
    )
    fingerprints = {chat_of("qwen3", train_on=on).fingerprint for on in ("assistant", "all")}
    assert len(fingerprints | {chat.fingerprint}) == 3


# What is trained on


def supervised_texts(samples: list[TokenizedSample]) -> list[str]:
    return [
        golden_tokenizer().decode(sample.token_ids[first : last + 1])
        for sample in samples
        for first, last in zip(*supervised_runs(sample), strict=True)
    ]


def test_the_last_answer_alone() -> None:
    chat = chat_of("chatml", train_on="last_assistant")
    assert supervised_texts(chat.tokenize(cases()["multi"])) == [" \u597d\n<|im_end|>"]
    assert supervised_texts(chat.tokenize(cases()["untrained"])) == ["It is 3.<|im_end|>"]
    last = conversation(
        *(Message("user", "q"), Message("assistant", "a")),
        *(Message("user", "r"), Message("assistant", "b", train=False)),
    )
    assert supervised_texts(chat.tokenize(last)) == []


@pytest.mark.parametrize("name", ["chatml", "simple_chat", "qwen3"])
def test_all_tokens_but_those_of_turns_that_are_not_to_be_supervised(name: str) -> None:
    chat = chat_of(name, train_on="all")
    (sample,) = chat.tokenize(cases()["multi"])
    assert sample.label_mask.tolist() == [1] * (sample.token_ids.size - 1) + [0]
    if name == "qwen3":  # the answer is written without its think block once others follow
        with pytest.raises(UnusableRow, match=r"message \d\b.*<think>"):
            chat.tokenize(cases()["untrained"])
        with pytest.raises(UnusableRow, match=r"\breasoning of message 1\b"):
            chat.tokenize(cases()["reasoning"])
        return
    (sample,) = chat.tokenize(cases()["untrained"])
    left_out = sample.token_ids[1:][sample.label_mask[:-1] == 0]
    assert golden_tokenizer().decode(left_out).strip() == "4?<|im_end|>"


# Marks


@pytest.mark.parametrize(
    ("marked", "supervised"),
    [
        # Around the header and the line break too: neither is supervised.
        (
            "{%- generation %}{{- '<|im_start|>assistant\\n' + message.content + '<|im_end|>\\n' }}"
            "{%- endgeneration %}",
            ["It is 3.<|im_end|>", "x y<|im_end|>"],
        ),
        # A part of the answer: that, and the end of turn.
        (
            "{{- '<|im_start|>assistant\\n' + message.content[:-2] }}"
            "{%- generation %}{{- message.content[-2:] }}{%- endgeneration %}"
            "{{- '<|im_end|>\\n' }}",
            ["3.<|im_end|>", " y<|im_end|>"],
        ),
    ],
)
def test_marks_narrow_what_is_supervised_and_never_widen_it(
    marked: str, supervised: list[str]
) -> None:
    template = (
        "{%- for message in messages %}{%- if message.role == 'assistant' %}"
        + marked
        + "{%- else %}{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}"
        + "{%- endif %}{%- endfor %}"
        + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )
    chat = ChatTokenizer(golden_tokenizer(), template=template)
    row = conversation(
        *(Message("user", "q"), Message("assistant", "It is 3.")),
        *(Message("user", "r"), Message("assistant", "x y")),
    )
    assert supervised_texts(chat.tokenize(row)) == supervised


def test_marks_stand_in_for_a_generation_prompt() -> None:
    template = TEMPLATES["marked"].replace("add_generation_prompt", "false")
    chat = ChatTokenizer(golden_tokenizer(), template=template)
    assert supervised_texts(chat.tokenize(cases()["multi"])) == [
        "It is 3.<|im_end|>",
        " \u597d\n<|im_end|>",
    ]


# Tools, reasoning, dates


def test_arguments_are_given_in_the_form_that_comes_out_as_json() -> None:
    as_text = TEMPLATES["qwen"].replace("['arguments'] | tojson", "['arguments']")
    assert as_text != TEMPLATES["qwen"]
    chat = ChatTokenizer(golden_tokenizer(), template=as_text)
    assert golden(chat, cases()["tools"]) == GOLDEN["qwen/tools"]


def test_a_template_that_leaves_out_tools_or_reasoning_refuses_such_rows() -> None:
    lines = TEMPLATES["chatml"].splitlines()
    silent = "\n".join(line for line in lines if "has no place" not in line)
    chat = ChatTokenizer(golden_tokenizer(), template=silent)
    row = cases()["single"]
    offered = Conversation(row.messages, row=0, line=1, tools=cases()["tools"].tools)
    with pytest.raises(UnusableRow, match=r"\btool 'add'"):
        chat.tokenize(offered)
    with pytest.raises(UnusableRow, match=r"\breasoning\b"):
        chat.tokenize(cases()["reasoning"])
    with pytest.raises(UnusableRow, match=r"\btool calls\b"):
        chat.tokenize(cases()["tools"])


def test_a_date_in_a_template_is_the_same_every_day() -> None:
    template = "{{- strftime_now('%d %b %Y') + '\\n' }}" + TEMPLATES["chatml"]
    chat = ChatTokenizer(golden_tokenizer(), template=template)
    (sample,) = chat.tokenize(cases()["single"])
    assert golden_tokenizer().decode(sample.token_ids).startswith("26 Jul 2024\n<|im_start|>")


# Any text

PIECES = ["<|im_end|>", "<|im_start|>assistant\n", "[/INST]", "<|eot_id|>", "<|assistant|>\n"]
PIECES += [
    "\n",
    " ",
    "\x00",
    "{{x}}",
    "e\u0301",
    "\U0001f468\u200d\U0001f469",
    "\u4f60\u597d",
    "Assistant:",
]
# But the four characters that `data.encode` needs, which tests/data/chat/test_chat.py is about.
LETTERS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0\ufdd1\ufdd2\ufdd3"),
    max_size=6,
)
texts = st.lists(
    st.sampled_from(PIECES) | LETTERS,
    max_size=4,
).map("".join)
turns = st.lists(st.tuples(texts, texts, st.booleans()), min_size=1, max_size=3)
ENDS = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}
SPACED = ("mistral", "simple_chat")


@settings(deadline=None, max_examples=40)
@given(turns=turns, system=st.none() | texts)
@example(turns=[("q", "<|im_end|>\n<|im_start|>assistant\n", True)], system="<|im_end|>")
@example(turns=[("[/INST]", "", True), ("", "a", True)], system=None)
def test_any_conversation_is_supervised_exactly_or_refused_alike(
    turns: list[tuple[str, str, bool]], system: str | None
) -> None:
    messages = [] if system is None else [Message("system", system)]
    for question, answer, train in turns:
        messages += [Message("user", question), Message("assistant", answer, train=train)]
    row = conversation(*messages)
    results = {}
    for name in ("chatml", "marked", "llama3", "mistral", "zephyr", "simple_chat", "qwen3"):
        (quick,) = chat_of(name).tokenize_many([row])
        (proved,) = chat_of(name, quick=False).tokenize_many([row])
        results[name] = comparable(quick)
        assert results[name] == comparable(proved), name
        kept = [answer for _, answer, train in turns if train]
        if isinstance(quick, UnusableRow):
            assert "one token spans" in str(quick) or "end-of-turn token" in str(quick), name
            continue
        supervised = supervised_texts(quick)
        assert len(supervised) == len(kept), name
        if name == "qwen3":
            continue  # it moves line breaks; test_samples_are_the_golden_ones has it
        space, end = " " if name in SPACED else "", ENDS.get(name, "<|im_end|>")
        assert supervised == [space + answer + end for answer in kept], name
    assert results["chatml"] == results["marked"]


def test_many_rows_at_once_are_what_they_are_alone() -> None:
    rows = list(cases().values()) * 2
    for name in ("chatml", "qwen3"):
        many = chat_of(name).tokenize_many(rows)
        alone = [chat_of(name).tokenize_many([row])[0] for row in rows]
        assert list(map(comparable, many)) == list(map(comparable, alone))
