"""Text for files, consoles and trackers: without credentials, control characters or long values.

Everything that a run writes passes through `redacted`. Promise: it masks the user and password of a
URL, its query, and tokens of the hub, and it writes the reference where a value of the
configuration came from the environment.
"""

import os
import re
import reprlib
import unicodedata
from collections.abc import Mapping
from typing import Any

MASK = "***"
SHOWN_LENGTH = 200
LINE_LENGTH = 1900  # of a line on the console; the remedy is at its end
_AS_YAML = {None: "null", True: "true", False: "false"}
_URL = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.\-]{0,30}://)(\S*)")
_PARAMETER = re.compile(r"([?&][\w.\-]{1,64}=)[^&\s'\"]+")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_SHORTEST_VALUE = 6  # a shorter one is in texts that have nothing to do with it
_references: dict[str, str] = {}  # value -> reference, such as ${oc.env:HF_TOKEN}
_BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def refer(references: Mapping[str, str]) -> None:
    """Have `redacted` write the reference for a value, but for numbers and paths that are here."""
    for value, reference in references.items():
        is_number = value.replace(".", "", 1).isdigit()
        if len(value) >= _SHORTEST_VALUE and not is_number and not os.path.exists(value):
            _references[value] = reference


def references() -> dict[str, str]:
    """What `refer` was given, for another process to be told."""
    return dict(_references)


def redacted(text: str) -> str:
    """`text` with references for values of the environment, without credentials."""
    for value, reference in _references.items():
        text = text.replace(value, reference)
    return without_credentials(text)


def without_credentials(text: str) -> str:
    """`text` with the credentials of every URL in it masked, in every process alike."""
    text = _URL.sub(_masked, text)
    # A part of a URL, such as its suffix, may be quoted without its beginning.
    return _HUB_TOKEN.sub(f"hf_{MASK}", _PARAMETER.sub(rf"\1{MASK}", text))


def redacted_tree(value: Any) -> Any:
    """Mappings and lists of JSON's types, every text in them `redacted`."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {redacted_tree(key): redacted_tree(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_tree(each) for each in value]
    return value


def shown(value: object) -> str:
    """`value` for a message: quoted, escaped and redacted, at most some 200 characters of it."""
    if value is None or isinstance(value, bool):
        return _AS_YAML[value]
    text = _Short().repr(value)
    return text if len(text) <= 2 * SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}..."


def printable(text: str) -> str:
    """`text` for a terminal or a log: redacted, control characters escaped, long lines cut."""
    return "\n".join(map(_cut, map(_escaped, redacted(text).split("\n"))))


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = SHOWN_LENGTH

    def repr_str(self, value: str, level: int) -> str:
        return super().repr_str(redacted(value), level)


def _masked(match: re.Match[str]) -> str:
    scheme, rest = match.groups()
    is_web = scheme.lower() in ("http://", "https://")
    head, _, tail = rest.partition("/")
    user, at, _ = head.rpartition("@")
    # A bucket may be `container@account`; a name alone is a token on the web only.
    if at and (":" in user or is_web):
        rest = f"{MASK}@{rest[len(user) + 1 :]}"
    elif "@" in tail and re.fullmatch(r"[^\[:]*:(?!\d*$).*", head):  # a password with a slash
        rest = f"{MASK}@{rest.rpartition('@')[2]}"
    # A query or a fragment ends where a quoted text does.
    mark = r"[?#]" if is_web else r"\?(?=[^'\"]*=)"
    return scheme + re.sub(rf"({mark})[^'\"\s]+", rf"\1{MASK}", rest, count=1)


def _escaped(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(repr(each)[1:-1] if is_hostile(each) else each for each in line)


def is_hostile(letter: str) -> bool:
    """Whether a terminal interprets `letter`, or cannot encode it."""
    is_control = unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") and letter != "\t"
    return is_control or letter in _BIDIRECTIONAL


def _cut(line: str) -> str:
    if len(line) <= LINE_LENGTH:
        return line
    kept = LINE_LENGTH // 2
    return f"{line[:kept]} ... ({len(line):,} characters) ... {line[-kept:]}"
