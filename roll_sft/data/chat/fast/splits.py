"""How a byte-level tokenizer cuts a text into pieces, within which it merges bytes.

The pattern in tokenizer.json names the split. The patterns listed here cut alike in `regex` and in
Oniguruma, the engine of tokenizers, except at characters that the two classify by different
versions of Unicode. `Split.agrees_on` finds these by asking both.
"""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import regex
from tokenizers import Regex, pre_tokenizers

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_ANY_CASE = r"\p{Lm}\p{Lo}\p{M}"
_UPPER, _LOWER = rf"[\p{{Lu}}\p{{Lt}}{_ANY_CASE}]", rf"[\p{{Ll}}{_ANY_CASE}]"
_CASED = r"[^\r\n\p{L}\p{N}]?" + _UPPER

_ASCII = {
    r"\p{L}": "A-Za-z",
    r"\p{Lu}": "A-Z",
    r"\p{Ll}": "a-z",
    r"\p{N}": "0-9",
    **dict.fromkeys((r"\p{Lt}", r"\p{Lm}", r"\p{Lo}", r"\p{M}"), ""),
}

# The default pattern of `ByteLevel`, which is GPT-2's.
_BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
KNOWN_PATTERNS = {
    "GPT-4, Llama 3, OLMo 2": rf"{_WORDS}\p{{L}}+|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}",
    "Qwen 2, Qwen 3": rf"{_WORDS}\p{{L}}+|\p{{N}}|{_SIGNS}|{_SPACES}",
    "Qwen 3.5": (
        rf"{_WORDS}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
    ),
    "Mistral Nemo": (
        rf"{_CASED}*{_LOWER}+|{_CASED}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    ),
}


class Split:
    """Cuts texts by one pattern, as tokenizers does."""

    def __init__(self, pattern: str, theirs: pre_tokenizers.PreTokenizer) -> None:
        self._find_all = regex.compile(pattern, regex.V0).findall
        self._find_all_ascii = re.compile(_in_ascii(pattern), re.ASCII).findall  # twice as fast
        self._theirs = theirs

    def pieces(self, text: str) -> list[str]:
        """The pieces of `text` that the pattern finds; joined, less than `text` if it has gaps."""
        return self._find_all_ascii(text) if text.isascii() else self._find_all(text)

    def agrees_on(self, character: str) -> bool:
        """Whether a text with `character` is cut as tokenizers cuts it.

        Beside a letter of either case, a digit, a sign, an apostrophe, spaces, a line's end and
        itself, a character shows every class that a pattern can put it in.
        """
        c = character
        text = f"a{c}b{c}A{c} {c}1{c}!{c}'{c}S{c}\n{c}{c}\t{c}\r\n{c}  {c}a{c}1 {c}! {c}\n"
        try:
            parts = self._theirs.pre_tokenize_str(text)
        except (TypeError, UnicodeError):  # half a surrogate pair, which is no text
            return False
        return [place for _, place in parts] == _places(self.pieces(text))


def split_of(backend: Mapping[str, Any]) -> Split | None:
    """The split of a tokenizer's JSON; None if it is not byte-level or cuts in another way."""
    match backend.get("pre_tokenizer"):
        case {"type": "ByteLevel", "add_prefix_space": False, **rest} if rest.get("use_regex", 1):
            return Split(_BYTE_LEVEL, pre_tokenizers.ByteLevel(add_prefix_space=False))
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": pattern},
                    "behavior": "Isolated",
                    "invert": 0,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if pattern in KNOWN_PATTERNS.values():
            return Split(pattern, pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    return None


@cache
def byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in a byte-level vocabulary, for `str.translate`.

    Source: GPT-2's encoder: what Latin-1 prints stands for itself, all else for what follows 255.
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    shifted = {byte: chr(256 + index) for index, byte in enumerate(others)}
    return {byte: chr(byte) for byte in printed} | shifted


def _in_ascii(pattern: str) -> str:
    """A pattern with its classes of characters written out, as far as ASCII has them."""

    def written_out(found: re.Match[str]) -> str:
        inside = re.sub(r"\\p\{\w+\}", lambda name: _ASCII[name[0]], found[0])
        return inside if found[0].startswith("[") else f"[{inside}]"

    return re.sub(r"\[[^]]*\]|\\p\{\w+\}", written_out, pattern)


def _places(pieces: list[str]) -> list[tuple[int, int]]:
    places, start = [], 0
    for piece in pieces:
        places.append((start, start + len(piece)))
        start += len(piece)
    return places
