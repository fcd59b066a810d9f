"""Masks of texts cut by hand, token by token: by places, and by the tokens around an answer."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import pytest

from roll_sft.base.errors import DataError
from roll_sft.data.chat.encoder import Encoded, Encoder, EncoderFacts, placed
from roll_sft.data.chat.fast.answer_markers import AnswerMarkers, masks_by_markers
from roll_sft.data.chat.mask import cut_at_headers, mask_by_places, supervised_runs
from roll_sft.data.chat.sample import TokenizedSample, UnusableRow
from roll_sft.data.chat.turns import AnswerSpan, RenderedChat
from tests.tiny import tiny_tokenizer

# One character each, and a letter is a word: H a header, C markup of a call, E the end of a turn,
# Z the end of the text.
CONTROL = {"H": 1, "C": 2, "E": 3, "Z": 4}


def encoded(*pieces: str) -> Encoded:
    """Each piece as one token."""
    stops = [*accumulate(map(len, pieces))]
    ids = [CONTROL.get(piece, 10 + ord(piece[0])) for piece in pieces]
    return Encoded(ids, [0, *stops[:-1]], stops)


def chat(
    text: str,
    *turns: tuple[int, int],
    calls: Sequence[bool] | None = None,
    answers: Sequence[bool] | None = None,
    spans: tuple[tuple[int, int], ...] | None = None,
    is_blank: bool = False,
) -> RenderedChat:
    """A text with its turns; `answers` and `calls` are of all its answers, trained on or not."""
    answers = answers or (True,) * len(turns)
    return RenderedChat(
        text,
        answers=tuple(answers),
        calls=tuple(calls or (False,) * len(answers)),
        turns=tuple(
            AnswerSpan(start, end, number, spans or ((start, end),), is_blank=is_blank)
            for number, (start, end) in enumerate(turns)
        ),
    )


def masked(
    text: RenderedChat, *pieces: str, ends: str = "", train_on_all: bool = False
) -> TokenizedSample:
    assert "".join(pieces) == text.text
    return mask_by_places(
        text,
        encoded(*pieces),
        control_ids=frozenset(CONTROL.values()),
        end_ids=frozenset(CONTROL[end] for end in ends),
        train_on_all=train_on_all,
    )


def mask_of(text: RenderedChat, *pieces: str, ends: str = "", train_on_all: bool = False) -> str:
    """The label mask, a digit a token."""
    sample = masked(text, *pieces, ends=ends, train_on_all=train_on_all)
    return "".join(map(str, sample.label_mask.tolist()))


@pytest.mark.parametrize(
    ("text", "turn", "expected"),
    [
        ("uHabEv", (2, 5), "011100"),  # the header predicts the first word, the last word the end
        ("HabEv", (1, 4), "11100"),
        ("abEv", (0, 3), "1100"),  # nothing predicts the first token of a text
        ("uHE", (2, 3), "010"),  # an answer without words still ends
        ("uHaE v", (2, 5), "011000"),  # the space after the end is context
    ],
)
def test_each_token_of_an_answer_is_predicted_by_the_one_before(
    text: str, turn: tuple[int, int], expected: str
) -> None:
    assert mask_of(chat(text, turn), *text) == expected


def test_all_but_a_marked_answer_is_trained_on() -> None:
    assert mask_of(chat("uHabEvw", (2, 5)), *"uHabEvw", train_on_all=True) == "1000110"
    assert mask_of(chat("uHabE", answers=[False]), *"uHabE", train_on_all=True) == "11110"


def test_the_end_of_a_turn_is_told_from_markup_and_from_the_end_of_the_text() -> None:
    plain, call = chat("HaEZ", (1, 4)), chat("HaCE", (1, 4), calls=[True])
    assert mask_of(plain, *"HaEZ") == "1100"  # plain text has no markup: the first
    assert mask_of(call, *"HaCE") == "1110"  # a call has: the last
    both = chat("HaCEZ", (1, 5), calls=[True])
    assert mask_of(both, *"HaCEZ") == "11110"
    assert mask_of(both, *"HaCEZ", ends="E") == "11100"  # the one that is known
    assert mask_of(chat("HaEEZ", (1, 5)), *"HaEEZ", ends="E") == "11000"  # the first of these


def test_a_blank_answer_with_several_control_tokens_is_refused() -> None:
    with pytest.raises(UnusableRow, match=r"message 0 \(assistant\)"):
        masked(chat("HCE", (1, 3), is_blank=True), *"HCE")
    assert mask_of(chat("HE", (1, 2), is_blank=True), *"HE") == "10"
    assert mask_of(chat("HCE", (1, 3), is_blank=True), *"HCE", ends="E") == "110"


def test_control_tokens_before_the_last_words_end_nothing() -> None:
    assert mask_of(chat("HaCbEv", (1, 5)), *"HaCbEv") == "111100"
    assert mask_of(chat("HaCbE ", (1, 6)), *"HaCbE ") == "111100"
    with pytest.raises(DataError, match=r"end-of-turn token .*'aCb'"):
        masked(chat("HaCb", (1, 4)), *"HaCb")
    with pytest.raises(DataError, match=r"end-of-turn token .*'a'"):  # the E is of the next turn
        masked(chat("HaE", (1, 2)), *"HaE")


def test_marks_narrow_an_answer_and_its_end_stays() -> None:
    assert mask_of(chat("HabcE", (1, 5), spans=((2, 3),)), *"HabcE") == "01010"
    assert mask_of(chat("HabcE", (1, 5), spans=((1, 2), (3, 4))), *"HabcE") == "10110"
    assert mask_of(chat("HabcE", (1, 5), spans=((3, 5),)), *"HabcE") == "00110"


def test_a_supervised_call_is_kept_whole() -> None:
    text = chat("HaEHbcCE", (4, 8), answers=[False, True], calls=[False, True])
    assert masked(text, *"HaEHbcCE").atomic == ((4, 8),)
    assert masked(text, *"HaEHbcCE", train_on_all=True).atomic == ()
    other = chat("HaEHbcE", (4, 7), answers=[False, True], calls=[True, False])
    assert masked(other, *"HaEHbcE").atomic == ()


def test_a_token_across_the_end_of_a_header_is_refused() -> None:
    for pieces in (("u", "Ha", "b", "E"), ("uHa", "b", "E")):
        with pytest.raises(UnusableRow, match=r"'uH'.*'abE'.* message 0\b"):
            masked(chat("uHabE", (2, 5)), *pieces)
    assert mask_of(chat("uHabE", (2, 5)), "uH", "ab", "E") == "110"


def test_offsets_that_go_backwards_are_refused() -> None:
    text, tokens = chat("HabE", (1, 4)), encoded(*"HabE")
    tokens.starts[1:3] = [1, 1]  # two tokens of one character
    tokens.ends[1:3] = [3, 3]
    sample = mask_by_places(text, tokens, control_ids=frozenset({3}), train_on_all=False)
    assert sample.label_mask.tolist() == [1, 1, 1, 0]
    tokens.starts[1:3] = [2, 1]
    with pytest.raises(UnusableRow, match="offsets"):
        mask_by_places(text, tokens, control_ids=frozenset({3}), train_on_all=False)


def test_the_runs_of_a_mask_are_named_by_the_tokens_they_predict() -> None:
    ids = np.arange(8, dtype=np.int32)
    mask = np.array([1, 1, 0, 0, 1, 0, 1, 0], np.uint8)
    assert supervised_runs(TokenizedSample(ids, mask)) == ([1, 5, 7], [2, 5, 7])
    assert supervised_runs(TokenizedSample(ids, mask * np.uint8(0))) == ([], [])


def test_a_text_is_cut_only_where_a_token_lies_across_a_header() -> None:
    encoder = Encoder(EncoderFacts.of(tiny_tokenizer()))
    head, answer = "<|im_start|>assistant\n", "\nyes<|im_end|>\n"
    for start, is_cut in ((len(head), True), (len(head) + 1, False), (len("<|im_start|>"), False)):
        text = chat(head + answer, (start, len(head + answer)))
        whole = placed(encoder.backend.encode(text.text, add_special_tokens=False))
        crossed = any(
            left < start < right for left, right in zip(whole.starts, whole.ends, strict=True)
        )
        assert crossed == is_cut, "the two line breaks are one token"
        found = cut_at_headers(text, whole, encoder)
        assert (found is not whole) == is_cut
        assert start in found.starts
        assert encoder.backend.decode(found.ids, skip_special_tokens=False) == text.text
        assert encoder.control_ids.intersection(found.ids) == encoder.control_ids.intersection(
            whole.ids
        )
    text = chat("\n\nyes", (1, 5))  # the very first token lies across
    whole = placed(encoder.backend.encode(text.text, add_special_tokens=False))
    assert cut_at_headers(text, whole, encoder).starts[:2] == [0, 1]
    assert cut_at_headers(chat("\n\nyes", (0, 5)), whole, encoder) is whole  # it has no header


# By the tokens around an answer.


def by_markers(
    *texts: str, header: str, ends: str, answers: int = 2, train_on_all: bool = False
) -> list[str | None]:
    """The mask of each text, a letter a token; None where the markers do not tell its answers."""
    markers = AnswerMarkers(tuple(map(ord, header)), tuple(map(ord, ends)), header, tuple(ends))
    samples = masks_by_markers(
        [chat(text, answers=[True] * answers) for text in texts],
        [np.array([*map(ord, text)], np.int32) for text in texts],
        markers=markers,
        train_on_all=train_on_all,
    )
    return [
        None if each is None else "".join(map(str, each.label_mask.tolist())) for each in samples
    ]


def test_an_answer_ends_before_the_next_header() -> None:
    assert by_markers("uHaEuHbcE", header="H", ends="E") == ["011001110"]
    # The first answer has no end of its own: the one that is found belongs to the second.
    assert by_markers("uHauHbcE", header="H", ends="E") == [None]
    assert by_markers("HaHbE", header="H", ends="E") == [None]
    # What ends an answer may begin the next header, and lie nowhere else in it.
    assert by_markers("EHaEHbE", header="EH", ends="E") == ["0110110"]
    assert by_markers("HERaHERbE", header="HER", ends="E") == [None]
    # The last answer ends within the text, at its last token at the latest.
    assert by_markers("HaEHb", header="H", ends="E") == [None]
    assert by_markers("HaEHbE", "HaEHbEu", header="H", ends="E") == ["110110", "1101100"]


def test_a_header_lies_in_one_text_and_stands_before_each_answer() -> None:
    # The first text ends, and the second begins, with a part of the header.
    texts = ("HRaEHRbEH", "RuHRaEHRbE")
    assert by_markers(*texts, header="HR", ends="E") == ["011001100", "0001100110"]
    assert by_markers("HaE", "HaEHbEHcE", header="H", ends="E") == [None, None]
    assert by_markers("HaEHbE", header="H", ends="E", train_on_all=True) == ["001000"]
