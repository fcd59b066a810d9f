"""The table of pieces gives the tokenizer's own ids, or leaves a text to the tokenizer."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers.models.qwen2 import tokenization_qwen2
from transformers.models.qwen3_5 import tokenization_qwen3_5

from roll_sft.data.chat.fast import piece_table
from roll_sft.data.chat.fast.piece_table import PieceTable
from roll_sft.data.chat.fast.splits import KNOWN_PATTERNS, split_of

CONTROL = ("<|im_start|>", "<|im_end|>", "<|im")
TRAINED_ON = (
    "The answer's here: it isn't 1234, it's 5678.\n\n    def add(a, b):\n\t\treturn a + b\r\n",
    "Grüße aus Köln, c'est l'été à Paris. Ελληνικά, русский язык; 日本語の文章。 한국어 😀👩‍🚀",
)
GPT_2 = "GPT-2"
SPLITS = [GPT_2, *KNOWN_PATTERNS]
# What patterns tell apart, and what lies at the edges of their classes.
SIGNS = (
    "\xa0\u2028\u3000\u200d\u0301\u00e9\u01c5\u0295\u0378\u02b0\u0660\u00bd\u2167aA1!/\x00\x1c\x85"
)
PHRASES = (
    "<|",
    "'s",
    "'LL",
    "'\u017f",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "e\u0301",
    "Zz",
    "12345",
    "?!",
)
TRICKY = st.sampled_from([*CONTROL, *SIGNS, *PHRASES])
TEXTS = st.lists(TRICKY | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)).map(
    "".join
)


def trained(split: str, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    backend = Tokenizer(BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split == GPT_2)
    backend.pre_tokenizer = byte_level
    if split != GPT_2:
        cut = pre_tokenizers.Split(Regex(KNOWN_PATTERNS[split]), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in CONTROL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(TRAINED_ON * 4, trainer)
    return backend


def ids_of(backend: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [each.ids for each in backend.encode_batch_fast(texts, add_special_tokens=False)]


@pytest.fixture(scope="module", params=[(split, nfc) for split in SPLITS for nfc in (False, True)])
def backend(request: pytest.FixtureRequest) -> Tokenizer:
    split, nfc = request.param
    return trained(split, normalizers.NFC() if nfc else None)


@pytest.fixture(scope="module")
def table(backend: Tokenizer) -> PieceTable:
    table = PieceTable.of(backend)
    assert table is not None
    return table


@settings(max_examples=150)
@given(texts=st.lists(TEXTS, max_size=4))
def test_ids_are_those_of_the_tokenizer(backend, table, texts):
    for found, wanted in zip(table.encode(texts), ids_of(backend, texts), strict=True):
        assert found is None or found.tolist() == wanted


def test_ordinary_text_of_any_script_is_encoded(backend, table):
    texts = [*TRAINED_ON, "", "<|im_start|>user\nWhat?<|im_end|>\n"]
    assert [ids.tolist() for ids in table.encode(texts)] == ids_of(backend, texts)


def test_text_that_may_be_cut_in_another_way_is_left_to_the_tokenizer():
    table = PieceTable.of(trained("Mistral Nemo", normalizers.NFC()))
    decomposed, unassigned = "e\u0301te\u0301", "a\u0378b"
    assert table is not None
    kept, *left = table.encode(["a", decomposed, unassigned])
    assert kept is not None
    assert left == [None, None]


def test_a_full_table_begins_anew(monkeypatch):
    monkeypatch.setattr(piece_table, "_MOST_PIECES", 20)
    monkeypatch.setattr(piece_table, "_LONGEST_PIECE", 8)
    backend = trained("Qwen 2, Qwen 3")
    table = PieceTable.of(backend)
    sizes = []
    for number in range(40):
        texts = [f"word{'x' * number} {'long' * 5}{number}", "again and again"]
        assert [ids.tolist() for ids in table.encode(texts)] == ids_of(backend, texts)
        sizes.append(len(table))
    assert max(sizes) < 40
    assert min(sizes[20:]) < 20
    assert not any(len(piece) > 8 for piece in table)


def test_patterns_are_those_of_the_tokenizers_that_they_are_named_after():
    qwen, qwen_3_5 = (m.PRETOKENIZE_REGEX for m in (tokenization_qwen2, tokenization_qwen3_5))
    assert KNOWN_PATTERNS["Qwen 2, Qwen 3"] == qwen
    assert KNOWN_PATTERNS["Qwen 3.5"] == qwen_3_5
    assert KNOWN_PATTERNS["GPT-4, Llama 3, OLMo 2"] == qwen.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "Lowercase"}},
    ],
)
def test_another_kind_of_tokenizer_has_no_table(change):
    described = json.loads(trained(GPT_2).to_str()) | change
    assert PieceTable.of(Tokenizer.from_str(json.dumps(described))) is None


def test_added_tokens_that_take_spaces_and_dropout_have_no_table():
    backend = trained(GPT_2)
    backend.add_special_tokens([AddedToken("<tool>", lstrip=True)])
    assert PieceTable.of(backend) is None
    described = json.loads(trained(GPT_2).to_str())
    described["model"]["dropout"] = 0.1
    assert PieceTable.of(Tokenizer.from_str(json.dumps(described))) is None


def test_added_tokens_that_are_looked_for_in_turns_have_no_table():
    """Those of the first turn may lie inside those of the second."""
    backend = trained(GPT_2)
    backend.add_tokens([AddedToken("<|>im>", normalized=True)])
    assert PieceTable.of(backend) is None


def test_an_unknown_pattern_is_not_trusted():
    described = json.loads(trained("Qwen 3.5").to_str())
    described["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += "|x"
    assert split_of(described) is None


def test_a_character_of_which_versions_of_unicode_differ_is_found():
    """U+0295 changed its class from letter without case to lower-case letter."""
    split = split_of(json.loads(trained("Mistral Nemo").to_str()))
    texts = [f"A{character}a" for character in "\u0295\u00e9"]
    cut = pre_tokenizers.Split(Regex(KNOWN_PATTERNS["Mistral Nemo"]), behavior="isolated")
    for text in texts:
        theirs = [piece for piece, _ in cut.pre_tokenize_str(text)]
        if theirs != split.pieces(text):
            assert not split.agrees_on(text[1])
    assert split.agrees_on("\u00e9")
