"""The weight of a row: what its supervised tokens count in the loss."""

from dataclasses import replace

from roll_sft.data.rows.checks import BadRowError, NoAnswerError, is_empty
from roll_sft.data.rows.columns import WEIGHT, at
from roll_sft.data.rows.conversation import Conversation, Document

_MOST = 1e6


def weighted(row: Conversation | Document, value: object) -> Conversation | Document:
    """`row` with the weight `value`: a number from 0, true is 1; unchanged if it says nothing.

    Raises `NoAnswerError` for 0, with which a row has nothing to train on, and `BadRowError` for
    anything else.
    """
    if is_empty(value):
        return row
    if not isinstance(value, int | float) or not 0 <= value <= _MOST:
        raise BadRowError(
            f"{at(WEIGHT)} is {value!r}; the weight of a row is a number from 0 to {_MOST:g}"
        )
    if value == 0:
        raise NoAnswerError(f"{at(WEIGHT)} is 0, so the row is left out")
    return replace(row, weight=float(value))
