"""The result of tokenising a row: samples, or the reason why there are none."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedSample:
    """One sample of a row: `token_ids` int32 [T] and `label_mask` uint8 [T].

    `label_mask[t]` is 1 where the prediction of token t + 1 from token t is trained on. It is 0 for
    the last token. `atomic`: spans of tokens (start, stop) that truncation must keep whole, which
    are the supervised tool calls.
    """

    token_ids: NDArray[np.int32]
    label_mask: NDArray[np.uint8]
    atomic: tuple[tuple[int, int], ...] = ()


class UnusableRow(Exception):  # noqa: N818 - a description of the row, not a failure
    """A row that this tokenizer and template cannot turn into an exact sample.

    `is_of_template`: another template may work. To find one, templates are tried on the row, which
    takes time: so `remedy` is a function, and is called only where the reason is shown.
    """

    def __init__(self, reason: str, *, is_of_template: bool = False) -> None:
        super().__init__(reason)
        self.is_of_template = is_of_template
        self.remedy: Callable[[], str] | None = None

    def __str__(self) -> str:
        reason = str(self.args[0])
        return reason if self.remedy is None else f"{reason}; {self.remedy()}"


CONTEXT_CHARACTERS = 12


def quoted(text: str, *, end: bool = False) -> str:
    """Return the beginning, or the end, of a text for a message."""
    cut = text[-CONTEXT_CHARACTERS:] if end else text[:CONTEXT_CHARACTERS]
    return ascii(cut) if cut else "nothing"
