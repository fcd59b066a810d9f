"""Rows whose texts lie in columns: alpaca rows, pairs of messages, and documents.

The formats are those of `row_format`. All functions raise `BadRowError` for a row that cannot be
used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from roll_sft.data.rows.checks import BadRowError, NoAnswerError, kind_of, text_of
from roll_sft.data.rows.columns import (
    HISTORY,
    ColumnNames,
    ColumnPlan,
    at,
    column_text,
    find_column,
    required,
)
from roll_sft.data.rows.conversation import Message
from roll_sft.data.rows.row_format import check_answer, read_messages, with_system


def alpaca(columns: Mapping[str, object], plan: ColumnPlan) -> tuple[Message, ...]:
    """The messages of an alpaca row: earlier turns, the question and the answer."""
    names = plan.names
    prompt_name = required(columns, "prompt", names)
    response_name = required(columns, "response", names)
    prompt = column_text(columns, prompt_name)
    query = column_text(columns, find_column(columns, "query", names))
    response = column_text(columns, response_name)
    system_name = find_column(columns, "system", names)
    system = column_text(columns, system_name)
    if not response.strip():
        raise NoAnswerError(
            f"{at(response_name)} holds no text; a row needs a response to train on"
        )
    if not prompt and not query:
        raise BadRowError(f"{at(prompt_name)} is empty; a row needs a prompt")
    messages = (
        *_history(columns.get(HISTORY) or []),
        Message("user", f"{prompt}\n{query}" if query else prompt),
        Message("assistant", response, reasoning=_reasoning(columns, plan.reasoning)),
    )
    return with_system(messages, system, where=at(system_name))


def pair(
    columns: Mapping[str, object], names: ColumnNames, left_aside: set[str]
) -> tuple[Message, ...]:
    """The messages of a prompt and of a response; those of the response are trained on."""
    prompt_name = required(columns, "prompt", names)
    response_name = required(columns, "response", names)
    if query_name := find_column(columns, "query", names):
        raise BadRowError(
            f"{at(query_name)} has no place beside a prompt that is a list of messages; write it "
            f"as one of them"
        )
    asked = read_messages(columns[prompt_name], column=prompt_name, left_aside=left_aside)
    answered = read_messages(columns[response_name], column=response_name, left_aside=left_aside)
    check_answer(answered, where=at(response_name))
    untrained = tuple(replace(message, train=False) for message in asked)
    system = find_column(columns, "system", names)
    where = at(system)
    return with_system((*untrained, *answered), column_text(columns, system), where=where)


def document(columns: Mapping[str, object], names: ColumnNames) -> str:
    """The text of a row that is trained on as a whole."""
    name = required(columns, "text", names)
    text = column_text(columns, name)
    if not text.strip():
        raise NoAnswerError(f"{at(name)} holds no text; a row needs some to train on")
    return text


def _reasoning(columns: Mapping[str, object], names: Sequence[str]) -> str:
    """The thought before the answer."""
    texts = {column_text(columns, name) for name in names if name in columns} - {""}
    if len(texts) > 1:
        raise BadRowError(f"columns {' and '.join(names)} hold different texts; keep one of them")
    return texts.pop() if texts else ""


def _history(turns: object) -> tuple[Message, ...]:
    """Earlier turns of an alpaca row, [question, answer] each."""
    where = at(HISTORY)
    if not isinstance(turns, list):
        raise BadRowError(f"{where} is {kind_of(turns)}; it must be a list of [question, answer]")
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, list) or len(turn) != 2:
            raise BadRowError(f"{where}[{index}] must be a list of two texts: [question, answer]")
        question, answer = (text_of(said, where=f"{where}[{index}]") for said in turn)
        messages += (Message("user", question), Message("assistant", answer))
    return tuple(messages)
