"""Tokens as pieces of text: joined they are the decoded text, and each says what it is."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from roll_sft.data.chat.chat import ChatTokenizer
from roll_sft.data.chat.pieces import pieces_of, visible
from roll_sft.data.chat.sample import TokenizedSample
from roll_sft.data.rows.conversation import Conversation, Document, Message
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CHAT = ChatTokenizer(TOKENIZER)


def sample_of(answer: str) -> TokenizedSample:
    messages = (Message("user", "What is it?"), Message("assistant", answer))
    (sample,) = CHAT.tokenize(Conversation(messages, row=0, line=1))
    return sample


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs", "Cn", "Co"]), min_size=1))
def test_joined_pieces_are_the_decoded_text_and_cover_every_token(text: str) -> None:
    for sample in CHAT.tokenize(Document(text, row=0, line=1)):
        pieces = list(pieces_of(sample, TOKENIZER))
        ids = sample.token_ids.tolist()
        decoded = TOKENIZER.backend_tokenizer.decode(ids, skip_special_tokens=False)
        assert "".join(piece.text for piece in pieces) == decoded
        assert [token for piece in pieces for token in piece.ids] == ids
        assert [piece.start for piece in pieces] == [
            sum(len(before.ids) for before in pieces[:index]) for index in range(len(pieces))
        ]


def test_what_is_supervised_and_what_is_control_text() -> None:
    pieces = list(pieces_of(sample_of("中文 <|im_end|> ok"), TOKENIZER))
    supervised = "".join(piece.text for piece in pieces if piece.is_supervised)
    assert supervised == "中文 <|im_end|> ok<|im_end|>"
    control = [piece.text for piece in pieces if piece.is_control]
    assert control == ["<|im_start|>", "<|im_end|>"] * 3
    assert [piece.text for piece in pieces if piece.is_control and piece.is_supervised] == [
        "<|im_end|>"
    ]
    assert "文" in [piece.text for piece in pieces]  # of three bytes, three tokens


def test_a_space_that_a_decoder_strips_at_the_start_is_kept_inside() -> None:
    words = ["\u2581hello", "\u2581world", "!"]
    vocab = {token: index for index, token in enumerate(["<s>", "<unk>", *words])}
    backend = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    chat = sample_of("x")
    ids = chat.token_ids[:4].copy()
    ids[:] = [0, 2, 3, 4]
    sample = TokenizedSample(ids, chat.label_mask[:4])
    assert [piece.text for piece in pieces_of(sample, tokenizer)] == [
        "<s>",
        " hello",
        " world",
        "!",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("a\n\tb", "a↵\n⇥b"),
        ("\x00\x1b[31m\x7f\r", "⟨U+0000⟩⟨U+001B⟩[31m⟨U+007F⟩⟨U+000D⟩"),
        ("\u202eabc\u200b\ufeff\u2028", "⟨U+202E⟩abc⟨U+200B⟩⟨U+FEFF⟩⟨U+2028⟩"),
        ("👩‍👩‍👧 é 中文 ❤️", "👩‍👩‍👧 é 中文 ❤️"),
    ],
)
def test_characters_that_show_nothing_are_named(text: str, expected: str) -> None:
    assert visible(text) == expected
