"""Conversations as token ids and loss masks, checked id by id against the rendered text."""

import copy
import json
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from roll_sft.base.errors import DataError
from roll_sft.data.chat.chat import ChatTokenizer, TokenizedSample, UnusableRow
from roll_sft.data.rows.conversation import Conversation, Document, Message, ToolCall
from tests.tiny import CHATML_TEMPLATE, tiny_tokenizer

END = "<|im_end|>"
DEFAULT_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"

# Writes an empty think block before the last answer and drops reasoning from earlier ones.
REASONING_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.last and '</think>' not in message.content %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
    {%- if message.role == 'assistant' and not loop.last %}
        {{- message.content.split('</think>')[-1] }}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
TRIMMING_TEMPLATE = CHATML_TEMPLATE.replace("message.content +", "message.content | trim +")
PLAIN_TEMPLATE = """\
{%- for message in messages %}{{- message.role + ': ' + message.content + '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}
"""


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def only(chat: ChatTokenizer, row: Conversation | Document) -> TokenizedSample:
    """The one sample of a row."""
    (sample,) = chat.tokenize(row)
    assert (sample.token_ids.dtype, sample.label_mask.dtype) == (np.int32, np.uint8)
    return sample


def conversation(*turns: str, system: str | None = None) -> Conversation:
    """User and assistant in turn, beginning with the user."""
    messages = [] if system is None else [Message("system", system)]
    roles = ("user", "assistant")
    messages += [Message(roles[index % 2], content) for index, content in enumerate(turns)]
    return Conversation(tuple(messages), row=0, line=1)


def supervised(
    sample: TokenizedSample, tokenizer: PreTrainedTokenizerFast | None = None
) -> list[str]:
    """The text of each run of supervised tokens, decoded from ids alone."""
    assert len(sample.token_ids) == len(sample.label_mask)
    assert sample.label_mask[-1] == 0
    runs: list[list[int]] = []
    previous = False
    for target, mask in zip(
        sample.token_ids[1:].tolist(), sample.label_mask.tolist(), strict=False
    ):
        if mask and not previous:
            runs.append([])
        if mask:
            runs[-1].append(target)
        previous = mask
    return [(tokenizer or tiny_tokenizer()).decode(run) for run in runs]


def plain(result: list[TokenizedSample] | UnusableRow) -> object:
    """What a row gave, for comparison."""
    if isinstance(result, UnusableRow):
        return str(result)
    return [(s.token_ids.tolist(), s.label_mask.tolist(), s.atomic) for s in result]


def answers(*contents: str) -> list[str]:
    return [content + END for content in contents]


TEXTS = [
    "4",
    "The answer is the sum of two numbers.",
    " leading and trailing  ",
    "tail\n\n",
    "\ttab",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 caf\u00e9 e\u0301",
    "I am {{name}}, {% if x %} by {{author}}",
    "NUL \x00 and \x1b and \ufeff",
    "def f():\n    return 1\n",
    "<think>\nhm\n</think>\n\nyes",
    "1234567890",
    "a\r\nb\u2028c",
]


@pytest.mark.parametrize("text", TEXTS)
def test_exactly_the_answer_and_its_end_of_turn_are_supervised(text: str) -> None:
    sample = only(ChatTokenizer(tiny_tokenizer()), conversation(text, text))
    assert supervised(sample) == answers(text)
    expected = (
        f"{DEFAULT_SYSTEM}<|im_start|>user\n{text}<|im_end|>\n"
        f"<|im_start|>assistant\n{text}<|im_end|>\n"
    )
    assert tiny_tokenizer().decode(sample.token_ids) == expected


def test_the_mask_lies_on_the_predicting_token() -> None:
    tokenizer = tiny_tokenizer()
    sample = only(ChatTokenizer(tokenizer), conversation("Q", "A"))
    tail = tokenizer.convert_ids_to_tokens(sample.token_ids.tolist())[-6:]
    assert tail == ["<|im_start|>", "assistant", "\u010a", "A", END, "\u010a"]
    assert sample.label_mask[-6:].tolist() == [0, 0, 1, 1, 0, 0]
    assert not sample.label_mask[:-6].any()


@pytest.mark.parametrize("system", [None, "", "Be brief.", " \u4f60 {{x}} "])
def test_every_turn_is_supervised_and_the_system_message_never(system: str | None) -> None:
    turns = [text for text in TEXTS for _ in range(2)]
    sample = only(ChatTokenizer(tiny_tokenizer()), conversation(*turns, system=system))
    assert supervised(sample) == answers(*TEXTS)
    text = tiny_tokenizer().decode(sample.token_ids)
    assert text.count("<|im_start|>system\n") == 1
    assert (DEFAULT_SYSTEM in text) == (system is None)


def test_an_empty_answer_still_ends_and_a_last_question_is_context() -> None:
    sample = only(ChatTokenizer(tiny_tokenizer()), conversation("a", "", "b", "c", "d"))
    assert supervised(sample) == answers("", "c")


def test_ids_are_those_of_the_tokenizer_itself() -> None:
    tokenizer = tiny_tokenizer()
    row = conversation(*TEXTS[:6])
    turns = [{"role": message.role, "content": message.content} for message in row.messages]
    expected = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert only(ChatTokenizer(tokenizer), row).token_ids.tolist() == expected


def test_a_template_that_trims_is_followed() -> None:
    chat = ChatTokenizer(with_template(TRIMMING_TEMPLATE))
    sample = only(chat, conversation(" q ", "\n\n one \n", "q", " two"))
    assert supervised(sample) == answers("one", "two")


def test_a_template_with_generation_marks_is_masked_like_any_other() -> None:
    marked = CHATML_TEMPLATE.replace(
        "{{- '<|im_start|>' + message.role",
        "{% generation %}{% endgeneration %}{{- '<|im_start|>' + message.role",
    )
    assert marked != CHATML_TEMPLATE
    sample = only(ChatTokenizer(with_template(marked)), conversation("q", "a"))
    assert supervised(sample) == answers("a")


def test_what_the_template_adds_after_the_generation_prompt_is_supervised() -> None:
    chat = ChatTokenizer(with_template(REASONING_TEMPLATE))
    assert supervised(only(chat, conversation("q", "a"))) == answers("<think>\n\n</think>\n\na")


def test_a_template_that_rewrites_earlier_turns_gives_one_sample_for_each_answer() -> None:
    tokenizer = with_template(REASONING_TEMPLATE)
    chat = ChatTokenizer(tokenizer)
    samples = chat.tokenize(conversation("q", "a", "r", "b"))
    empty = "<think>\n\n</think>\n\n"
    assert [supervised(sample) for sample in samples] == [
        answers(f"{empty}a"),
        answers(f"{empty}b"),
    ]
    turn = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(samples[0].token_ids) == f"{turn}{empty}a<|im_end|>\n"
    assert tokenizer.decode(samples[1].token_ids).startswith(f"{turn}a<|im_end|>\n")
    samples = chat.tokenize(conversation("q", "<think>x</think>a", "q", "<think>y</think>b"))
    assert [supervised(sample) for sample in samples] == [
        answers("<think>x</think>a"),
        answers("<think>y</think>b"),
    ]


def test_a_template_that_rewrites_what_comes_before_any_answer_is_refused() -> None:
    counting = "{{- messages | length }}" + CHATML_TEMPLATE
    with pytest.raises(UnusableRow, match=r"\bmessage 1\b.*'1<.*'2<"):
        ChatTokenizer(with_template(counting)).tokenize(conversation("q", "a", "q", "a"))


def test_a_closing_token_after_the_end_of_turn_is_not_supervised() -> None:
    closing = (
        CHATML_TEMPLATE + "{%- if not add_generation_prompt %}{{- '<|endoftext|>' }}{% endif %}"
    )
    chat = ChatTokenizer(with_template(closing))
    assert supervised(only(chat, conversation("q", "a"))) == answers("a")


def test_a_template_that_drops_a_message_is_refused() -> None:
    no_system = CHATML_TEMPLATE.replace("messages[0]['content']", "'You are.'")
    with pytest.raises(UnusableRow, match=r"message 0 \(system\)"):
        only(ChatTokenizer(with_template(no_system)), conversation("q", "a", system="Be brief."))
    loud = CHATML_TEMPLATE.replace("message.content +", "message.content | upper +")
    with pytest.raises(UnusableRow, match=r"message 1 \(assistant\)"):
        only(ChatTokenizer(with_template(loud)), conversation("Q", "a"))


def test_a_template_without_end_of_turn_is_refused_with_the_remedy() -> None:
    chat = ChatTokenizer(with_template(PLAIN_TEMPLATE))
    with pytest.raises(DataError, match=r"end-of-turn.*'the answer\\n'.*eos_token"):
        only(chat, conversation("q", "the answer"))


def test_a_template_without_generation_prompt_is_refused() -> None:
    chat = ChatTokenizer(with_template(CHATML_TEMPLATE.replace("add_generation_prompt", "false")))
    with pytest.raises(DataError, match=r"add_generation_prompt.*'<\|im_start"):
        only(chat, conversation("q", "a"))


def test_a_template_whose_answers_need_no_header_is_accepted() -> None:
    bare = (
        "{%- for message in messages %}{{- '[' + message.content + ']' if message.role == 'user' "
        "else ' ' + message.content + eos_token }}{%- endfor %}"
    )
    chat = ChatTokenizer(with_template(bare))
    assert supervised(only(chat, conversation("q", "a", "q", "b"))) == answers(" a", " b")


def test_a_template_that_objects_refuses_the_row_with_its_words() -> None:
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UnusableRow, match=r"roles must alternate"):
        only(ChatTokenizer(with_template(strict)), conversation("q", "a"))


@pytest.mark.parametrize(
    ("template", "expected"),
    [("{% if %}", "chat template is broken at its line 1"), (None, "no default chat template")],
)
def test_a_missing_or_broken_template_is_a_data_error(template: str | None, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        only(ChatTokenizer(with_template(template)), conversation("q", "a"))


def test_several_templates_without_a_default_are_listed() -> None:
    tokenizer = with_template(None)
    tokenizer.chat_template = {"rag": CHATML_TEMPLATE, "tool_use": CHATML_TEMPLATE}
    with pytest.raises(DataError, match=r"\brag, tool_use\b"):
        ChatTokenizer(tokenizer).tokenize(conversation("q", "a"))
    tokenizer.chat_template["default"] = CHATML_TEMPLATE
    assert supervised(only(ChatTokenizer(tokenizer), conversation("q", "a"))) == answers("a")


def prompt_ids(tokenizer: PreTrainedTokenizerFast, row: Conversation) -> list[int]:
    """What transformers asks with, for the last answer of a row."""
    turns = [{"role": message.role, "content": message.content} for message in row.messages[:-1]]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert isinstance(ids, list)
    return ids


def test_no_token_lies_across_the_end_of_the_prompt() -> None:
    tokenizer, row = tiny_tokenizer(), conversation("q", "\n\nfour")
    sample = only(ChatTokenizer(tokenizer), row)
    assert supervised(sample) == answers("\n\nfour")
    asked, rest = prompt_ids(tokenizer, row), "\n\nfour<|im_end|>\n"
    assert sample.token_ids.tolist() == asked + tokenizer(rest).input_ids
    whole = tokenizer.decode(sample.token_ids)
    assert sample.token_ids.tolist() != tokenizer(whole).input_ids  # the line breaks would be one
    spelt = only(ChatTokenizer(tokenizer), conversation("q", "\n\n<|im_end|>"))
    assert supervised(spelt) == answers("\n\n<|im_end|>")


@pytest.mark.parametrize("role", [0, 1])
@pytest.mark.parametrize("template", [CHATML_TEMPLATE, REASONING_TEMPLATE])
def test_control_tokens_in_the_text_stay_text(role: int, template: str) -> None:
    tokenizer = with_template(template)
    turns = ["q", "a"]
    turns[role] = "x<|im_end|>\n<|im_start|>assistant\ny<|endoftext|>"
    sample = only(ChatTokenizer(tokenizer), conversation(*turns, system="s"))
    empty = "<think>\n\n</think>\n\n" if template == REASONING_TEMPLATE else ""
    assert supervised(sample) == answers(empty + turns[1])
    messages = [
        {"role": r, "content": c} for r, c in zip(("user", "assistant"), turns, strict=True)
    ]
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "s"}, *messages], tokenize=False
    )
    assert tokenizer.decode(sample.token_ids) == text
    ids = sample.token_ids.tolist()
    assert (ids.count(1), ids.count(2), ids.count(0)) == (3, 3, 0)


def test_text_around_control_text_is_encoded_as_ever() -> None:
    tokenizer = with_template(CHATML_TEMPLATE)
    tokenizer.add_tokens(["<think>"])  # an added token that is no control token
    bare = json.loads(tokenizer.backend_tokenizer.to_str())
    bare["added_tokens"] = [token for token in bare["added_tokens"] if not token["special"]]
    encode = Tokenizer.from_str(json.dumps(bare)).encode
    question = "The sum of two <think> numbers<|im_end|>\n\nis <|im_start|> the rest  "
    expected = [1, *encode("system\ns").ids, 2, *encode("\n").ids]
    expected += [1, *encode("user\n" + question).ids, 2, *encode("\n").ids]
    expected += [1, *encode("assistant\na").ids, 2, *encode("\n").ids]
    ids = only(ChatTokenizer(tokenizer), conversation(question, "a", system="s")).token_ids
    assert ids.tolist() == expected
    assert tokenizer.convert_tokens_to_ids("<think>") in expected


def test_a_control_token_that_text_is_made_of_is_refused() -> None:
    pieces = [("<unk>", 0.0), ("</s>", -1.0), ("\u2581", -2.0), ("a", -2.0), ("<", -9.0)]
    pieces += [(piece, -9.0) for piece in "/s>[]"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.add_special_tokens([AddedToken("</s>", normalized=False)])
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="</s>",
        chat_template="{% for m in messages %}{{ '[' + m.content + (eos_token if m.role == "
        "'assistant' else ']') }}{% endfor %}{{ '[' if add_generation_prompt }}",
    )
    chat = ChatTokenizer(tokenizer)
    assert supervised(only(chat, conversation("a", "aa")), tokenizer) == ["aa</s>"]
    with pytest.raises(UnusableRow, match=r"'</s>'"):
        chat.tokenize(conversation("a </s>", "a"))


def test_a_row_with_control_text_and_the_characters_that_mark_it_is_refused() -> None:
    with pytest.raises(UnusableRow, match=r"U\+FDD0"):
        ChatTokenizer(tiny_tokenizer()).tokenize(conversation("<|im_end|>\ufdd0", "a"))


def test_a_conversation_that_begins_with_an_answer_is_refused() -> None:
    row = Conversation((Message("assistant", "hello"), Message("user", "q")), row=0, line=1)
    with pytest.raises(UnusableRow, match=r"begins with an assistant message"):
        only(ChatTokenizer(tiny_tokenizer()), row)


def test_no_assistant_message_means_nothing_supervised() -> None:
    sample = only(ChatTokenizer(tiny_tokenizer()), conversation("q"))
    assert not sample.label_mask.any()


def test_many_at_once_give_what_one_by_one_gives() -> None:
    chat = ChatTokenizer(tiny_tokenizer())
    rows = [conversation("q", text) for text in ("a", "\n\nb", "\n\nc", "\U0001f600")]
    rows.append(Conversation((Message("assistant", "d"),), row=0, line=1))
    results = chat.tokenize_many(rows)
    assert [isinstance(result, UnusableRow) for result in results] == [False] * 4 + [True]
    for row, result in zip(rows, results, strict=True):
        if not isinstance(result, UnusableRow):
            assert plain(result) == plain([only(chat, row)])
    assert chat.tokenize_many([]) == []


@pytest.mark.parametrize("unknown", [None, "<|endoftext|>"])
def test_a_document_is_supervised_as_a_whole_and_ends(unknown: str | None) -> None:
    tokenizer = with_template(None)
    tokenizer.unk_token = unknown  # transformers' class for Qwen names the end of a text so
    chat = ChatTokenizer(tokenizer, template=CHATML_TEMPLATE)
    sample = only(chat, Document("One text.\n", row=0, line=1))
    assert tokenizer.decode(sample.token_ids) == "One text.\n<|endoftext|>"
    assert sample.label_mask.tolist() == [1] * (sample.token_ids.size - 1) + [0]


def test_a_document_begins_as_the_tokenizer_begins_a_text() -> None:
    tokenizer = with_template(CHATML_TEMPLATE)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    sample = only(ChatTokenizer(tokenizer), Document("text", row=0, line=1))
    assert tokenizer.decode(sample.token_ids) == "<|im_start|>text<|endoftext|>"
    assert sample.label_mask.tolist() == [1] * (sample.token_ids.size - 1) + [0]


# Several templates


def test_rows_with_tools_have_the_template_for_tools_if_there_is_one() -> None:
    tokenizer = with_template(None)
    named = "{{- tools[0].function.name }}" + CHATML_TEMPLATE
    tokenizer.chat_template = {"default": CHATML_TEMPLATE, "tool_use": named}
    plain = conversation("q", "a")
    tool = {"type": "function", "function": {"name": "add"}}
    offered = Conversation(plain.messages, row=0, line=1, tools=(tool,))
    rows = [plain, offered, plain]
    for row, (sample,) in zip(rows, ChatTokenizer(tokenizer).tokenize_many(rows), strict=True):
        turns = [{"role": m.role, "content": m.content} for m in row.messages]
        expected = tokenizer.apply_chat_template(
            turns, tools=list(row.tools) or None, return_dict=False
        )
        assert sample.token_ids.tolist() == expected
        assert supervised(sample) == answers("a")
    base = ChatTokenizer(tokenizer).fingerprint
    tokenizer.chat_template["tool_use"] = named + "{#- -#}"
    assert ChatTokenizer(tokenizer).fingerprint != base
    # A template of the user's own is for all rows.
    (sample,) = ChatTokenizer(tokenizer, template=named).tokenize(offered)
    assert supervised(sample) == answers("a")
    del tokenizer.chat_template["default"]
    chat = ChatTokenizer(tokenizer)
    assert [supervised(sample) for sample in chat.tokenize(offered)] == [answers("a")]
    with pytest.raises(DataError, match=r"\btool_use\b.*data\.chat_template=chatml or qwen\b"):
        chat.tokenize(plain)


# The end of a turn


@pytest.mark.parametrize("content", ["", "  ", "Let me see."])
@pytest.mark.parametrize("closing", ["", "{{- '<|endoftext|>' if not add_generation_prompt }}"])
def test_a_turn_that_ends_in_markup_of_control_tokens_ends_after_it(
    content: str, closing: str
) -> None:
    tokenizer = with_template(None)
    markup = ["<tool_call>", "</tool_call>"]
    tokenizer.add_special_tokens({"additional_special_tokens": markup})
    tokenizer.chat_template = (
        CHATML_TEMPLATE.replace(
            "message.content + '<|im_end|>\\n'",
            "message.content + calls + '<|im_end|>\\n'",
        ).replace(
            "{{- '<|im_start|>' + message.role",
            "{%- set calls = '<tool_call>' + message.tool_calls[0].function | tojson + "
            "'</tool_call>' if message.tool_calls else '' %}{{- '<|im_start|>' + message.role",
        )
        + closing
    )
    assert "calls +" in tokenizer.chat_template
    call = Message("assistant", content, tool_calls=(ToolCall("add", {"a": "1"}),))
    turns = (call, Message("tool", "1"), Message("assistant", "One."))
    for question in ("q", "what is <|im_end|>?"):  # the second has its mask by places
        row = Conversation((Message("user", question), *turns), row=0, line=1)
        samples = ChatTokenizer(tokenizer).tokenize(row)
        written = '{"name": "add", "arguments": {"a": "1"}}'
        assert [text for sample in samples for text in supervised(sample, tokenizer)] == [
            f"{content}<tool_call>{written}</tool_call>{END}",
            f"One.{END}",
        ]


# Tokenizers


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        ChatTokenizer(object())  # type: ignore[arg-type]


def test_trimmed_offsets_and_left_over_state_change_nothing() -> None:
    rows = [conversation("a  b", text) for text in TEXTS]
    expected = ChatTokenizer(tiny_tokenizer()).tokenize_many(rows)
    tokenizer = with_template(CHATML_TEMPLATE)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=2)
    results = ChatTokenizer(tokenizer).tokenize_many(rows)
    assert list(map(plain, results)) == list(map(plain, expected))


@pytest.mark.parametrize("trim", [False, True])
def test_trimmed_offsets_do_not_hide_a_token_across_the_border(trim: bool) -> None:
    spaced = PLAIN_TEMPLATE.replace("message.content + '", "message.content + eos_token + '")
    tokenizer = with_template(spaced)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    row = conversation("q", "the")
    sample = only(ChatTokenizer(tokenizer), row)
    assert supervised(sample) == answers("the")
    asked = prompt_ids(tokenizer, row)
    assert sample.token_ids[: len(asked)].tolist() == asked


def test_a_tokenizer_that_adds_a_beginning_does_not_double_it() -> None:
    tokenizer = with_template("{{- '<|endoftext|>' }}" + CHATML_TEMPLATE)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert tokenizer("a").input_ids[0] == 0
    sample = only(ChatTokenizer(tokenizer), conversation("q", "a"))
    assert sample.token_ids[:2].tolist() == [0, 1]
    assert supervised(sample) == answers("a")


def sentencepiece_like(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """Llama 2's way: a normalizer that prepends a space mark, byte tokens for rare characters."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    pieces += [chr(code) for code in range(33, 127)]
    pieces += ["".join(merge) for merge in merges]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=list(merges),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in pieces[:3]])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=(
            "{%- for message in messages %}{{- bos_token + '[' + message.content + ']' if "
            "message.role == 'user' else ' ' + message.content + eos_token }}{%- endfor %}"
        ),
        clean_up_tokenization_spaces=False,
    )


def test_byte_fallback_tokens_are_supervised_as_a_whole() -> None:
    tokenizer = sentencepiece_like()
    texts = ["plain", "\u4f60\U0001f600", "tab\t", "  two"]
    sample = only(ChatTokenizer(tokenizer), conversation(*[t for t in texts for _ in range(2)]))
    assert supervised(sample, tokenizer) == [f" {text}</s>" for text in texts]


def test_a_token_across_the_end_of_the_prompt_that_cannot_be_cut_is_refused() -> None:
    tokenizer = sentencepiece_like(("\u2581", "t"))
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{%- endfor %}", "{%- endfor %}{{- ' ' if add_generation_prompt }}"
    )
    chat = ChatTokenizer(tokenizer)
    assert supervised(only(chat, conversation("q", "one")), tokenizer) == ["one</s>"]
    # Encoded by itself the answer would begin with a space of its own.
    expected = r"one token spans .*'<s>\[q\] ' .*'two</s>' in message 1"
    with pytest.raises(UnusableRow, match=expected):
        chat.tokenize(conversation("q", "two"))


def test_control_text_stays_text_where_spaces_are_marks() -> None:
    tokenizer = sentencepiece_like()
    row = conversation("a</s> b", "x <s></s>", "c", "y")
    sample = only(ChatTokenizer(tokenizer), row)
    assert supervised(sample, tokenizer) == [" x <s></s></s>", " y</s>"]
    ids = sample.token_ids.tolist()
    assert (ids.count(1), ids.count(2)) == (2, 2)
    # What stands before is encoded as in a row that spells no control token.
    usual = only(ChatTokenizer(tokenizer), conversation("a</t> b", "x <t></t>", "c", "y"))
    changed = [pair for pair in zip(ids, usual.token_ids.tolist(), strict=True) if len({*pair}) > 1]
    spelt = {tuple(tokenizer.convert_tokens_to_ids(["s", "t"]))}
    assert (set(changed), len(changed)) == (spelt, 3)


def test_a_control_token_that_takes_the_spaces_after_it_is_exact_or_refused() -> None:
    tokenizer = with_template(
        CHATML_TEMPLATE.replace("|>assistant\\n'", "|><|bot|>\\n'").replace(
            "message.role + '\\n'", "('<|bot|>' if message.role == 'assistant' else 'user') + '\\n'"
        )
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|bot|>", rstrip=True, special=True)]}
    )
    chat = ChatTokenizer(tokenizer)
    assert supervised(only(chat, conversation("q", "a")), tokenizer) == answers("a")
    with pytest.raises(UnusableRow, match=r"<\|bot\|>\\n'.* message 1\b"):
        only(chat, conversation("q", "  a"))


def test_the_fingerprint_follows_what_changes_a_sample() -> None:
    base = ChatTokenizer(tiny_tokenizer()).fingerprint
    assert ChatTokenizer(copy.deepcopy(tiny_tokenizer())).fingerprint == base
    padded = with_template(CHATML_TEMPLATE)
    padded(["a", "b c"], padding=True)
    assert ChatTokenizer(padded).fingerprint == base

    changed: Sequence[PreTrainedTokenizerFast] = [with_template(CHATML_TEMPLATE) for _ in range(3)]
    changed[0].chat_template = CHATML_TEMPLATE + " "
    changed[1].add_tokens(["<new>"])
    changed[2].bos_token = "<|im_start|>"
    fingerprints = {ChatTokenizer(tokenizer).fingerprint for tokenizer in changed}
    assert len(fingerprints | {base}) == 4


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(deadline=None, max_examples=150)
@given(turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=3), normalise=st.booleans())
@example(turns=[("\u0301", "\u0301a"), (" ", " \n")], normalise=True)
@example(turns=[("", "\u1100\u1161\u11a8 e\u0323\u0307")], normalise=True)
def test_any_text_is_masked_exactly_or_refused(
    turns: list[tuple[str, str]], normalise: bool
) -> None:
    tokenizer = with_template(CHATML_TEMPLATE)
    if normalise:
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    row = conversation(*[text for turn in turns for text in turn])
    (result,) = ChatTokenizer(tokenizer).tokenize_many([row])
    if isinstance(result, UnusableRow):
        # The pattern joins line breaks, and NFC an accent, with what the header ends with.
        assert "one token spans" in str(result)
        return
    nfc = normalizers.NFC().normalize_str if normalise else str
    (sample,) = result
    assert supervised(sample, tokenizer) == answers(*[nfc(answer) for _, answer in turns])
