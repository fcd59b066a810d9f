"""The use of a column, by its name and the format of the row.

A column is read, refused, or left aside. It is refused if training without it would mean something
else than the row says. Any other column describes the row; its name is reported once a source.
"""

import functools
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from roll_sft.base.errors import ConfigError
from roll_sft.data.rows.checks import BadRowError, is_empty, listed, text_of

_log = logging.getLogger(__name__)

RowFormat = Literal["alpaca", "pairs", "messages", "sharegpt", "text"]

# What a column is for -> the names it is detected by.
KNOWN_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("instruction", "prompt"),
    "query": ("input", "query"),
    "response": ("output", "response", "completion"),
    "system": ("system", "system_prompt", "system_message"),
    "messages": ("messages", "conversations"),
    "text": ("text",),
    "tools": ("tools", "functions"),
}
HISTORY = "history"
REASONING = ("reasoning_content", "reasoning", "thinking")
TEMPLATE_KWARGS = "chat_template_kwargs"
ENABLE_THINKING = "enable_thinking"

_BASE = ("system", "tools")
USES: Mapping[RowFormat, tuple[str, ...]] = {
    "alpaca": ("prompt", "query", "response", *_BASE),
    "pairs": ("prompt", "query", "response", *_BASE),
    "messages": ("messages", *_BASE),
    "sharegpt": ("messages", *_BASE),
    "text": ("text",),
}
_OF_TEMPLATE = frozenset({TEMPLATE_KWARGS, ENABLE_THINKING})

_MEDIA = (
    *("image", "images", "audio", "audios", "video", "videos"),
    *("image_url", "image_urls", "image_path", "image_paths", "audio_path", "video_path"),
)
_CONTEXT = ("context", "contexts", "passage", "document")
_ANSWERS = ("chosen", "rejected", "rejected_response", "preferred_output", "non_preferred_output")
_VERDICTS = ("label", "kto_tag", "desirable")
WEIGHT = "weight"  # of a row; of other names for it 1 and true change nothing
_WEIGHTS = (
    *("train", "training", "sample_weight", "loss_weight", "loss_scale", "loss"),
    *("loss_mask", "mask", "masked"),
)

_NO_TEXT = "only text can be trained on: remove it or write it into the text"
_WRITE_IT = "remove it or write it into the text"
_QUERY = "name it with data.query_key={name} to put it after the prompt, or remove it"
_ONE_ANSWER = (
    "one answer is trained on: name it, such as data.response_key=chosen or "
    "data.messages_key=chosen, or remove the others"
)
_NO_EXAMPLE = "false marks an answer that is not to be trained on: remove the row"
_WHOLE = (
    "the weight of a row is a number in column 'weight'; a message has train, true or false, beside"
    " its role"
)


@dataclass(frozen=True, slots=True)
class ColumnKeys:
    """The names that the user gave columns; None: the column is detected.

    Raises `ConfigError` for names that belong to two row formats.
    """

    prompt: str | None = None
    query: str | None = None
    response: str | None = None
    system: str | None = None
    messages: str | None = None
    text: str | None = None
    tools: str | None = None

    def __post_init__(self) -> None:
        given = [name for name, column in asdict(self).items() if column is not None]
        alone = {"text": {"text"}, "messages": {"messages", "system", "tools"}}
        for what, allowed in alone.items():
            if what in given and not allowed.issuperset(given):
                names = ", ".join(f"data.{name}_key" for name in given)
                raise ConfigError(
                    f"{names} belong to two row formats; set either data.{what}_key or the others"
                )

    def all_named(self) -> frozenset[str]:
        """Every column that the user named."""
        return frozenset(filter(None, asdict(self).values()))

    def optional(self) -> frozenset[str]:
        """The named columns that a row may lack; it is a warning if all rows of a source do."""
        return frozenset(filter(None, (self.query, self.system, self.tools)))


# What a column is for -> the names that it may have under given keys.
ColumnNames = Mapping[str, tuple[str, ...]]


@functools.cache
def column_names(keys: ColumnKeys) -> ColumnNames:
    """The names of each use under `keys`: the one that was named, or those it is detected by."""
    named: dict[str, str | None] = asdict(keys)
    # A column that the user gave one use is not detected for another.
    taken = frozenset(filter(None, named.values()))
    return {
        what: tuple(name for name in known if name not in taken)
        if (column := named[what]) is None
        else (column,)
        for what, known in KNOWN_COLUMNS.items()
    }


@dataclass(frozen=True, slots=True)
class ColumnPlan:
    """The columns of rows of one format.

    `names`: use -> names of the column. `reasoning`: names of the reasoning beside an answer.
    `refused`: name -> remedy. `known`: all of these; any other column is left aside.
    """

    names: ColumnNames
    reasoning: tuple[str, ...]
    refused: Mapping[str, str]
    known: frozenset[str]


@functools.cache
def column_plan(row_format: RowFormat, keys: ColumnKeys) -> ColumnPlan:
    """The columns of rows of `row_format` under `keys`."""
    names, refused = column_names(keys), _refused(row_format, keys)
    used = {name for what in USES[row_format] for name in names[what]}
    reasoning = tuple(name for name in REASONING if name not in used and row_format == "alpaca")
    own = {WEIGHT, HISTORY} if row_format == "alpaca" else {WEIGHT}
    template = frozenset() if row_format == "text" else _OF_TEMPLATE
    return ColumnPlan(
        names, reasoning, refused, template.union(used, own, reasoning, refused.keys())
    )


def _refused(row_format: RowFormat, keys: ColumnKeys) -> Mapping[str, str]:
    """Columns to refuse, each with the remedy; one that the user named is not refused."""
    refused: dict[str, str] = dict.fromkeys(_MEDIA, _NO_TEXT)
    if row_format == "text":
        if keys.text is None:
            no_template = (*KNOWN_COLUMNS["system"], *KNOWN_COLUMNS["tools"], *_OF_TEMPLATE)
            refused |= dict.fromkeys((HISTORY, *no_template), _WRITE_IT)
    else:
        refused |= dict.fromkeys((*_WEIGHTS, "chat_template"), _WHOLE)
        refused["chat_template"] = "one template serves all rows: set data.chat_template"
        refused["documents"] = _WRITE_IT
        if not keys.all_named().intersection(_ANSWERS):
            refused |= dict.fromkeys(_ANSWERS, _ONE_ANSWER)
        refused |= dict.fromkeys(_VERDICTS, _NO_EXAMPLE)
    if row_format in ("messages", "sharegpt", "pairs"):
        refused[HISTORY] = _WRITE_IT
    if row_format in ("alpaca", "pairs") and keys.query is None:
        refused |= {name: _QUERY.format(name=name) for name in _CONTEXT}
    return {name: remedy for name, remedy in refused.items() if name not in keys.all_named()}


def check_columns(
    columns: Mapping[str, object], *, plan: ColumnPlan, row_format: RowFormat
) -> None:
    """Raise `BadRowError` for a column that is refused, unless its value changes nothing."""
    if plan.refused.keys().isdisjoint(columns):
        return
    for name, remedy in plan.refused.items():
        value = columns.get(name)
        if not is_empty(value) and not _is_neutral(name, value):
            raise BadRowError(
                f"column '{name}' is not used by the {row_format} format, and leaving it out would "
                f"change what is trained; {remedy}"
            )


def _is_neutral(name: str, value: object) -> bool:
    """Whether this value of a refused column changes nothing."""
    if name in _VERDICTS:
        return value is not False
    if name == "masked":
        return value is False
    return name in _WEIGHTS and isinstance(value, int | float) and value == 1


def warn_of_unused(keys: ColumnKeys, used: Iterable[str], *, path: str) -> None:
    """Warn of optional columns that the user named and no row of `path` has."""
    for column in sorted(keys.optional().difference(used)):
        _log.warning("%s: no row uses the configured column '%s'", path, column)


def log_left_aside(columns: set[str], *, source: str) -> None:
    """Log the columns of a source, and keys of its messages, that samples are not made of."""
    if columns:
        _log.info("%s: columns left aside: %s", source, listed(columns))


def required(columns: Mapping[str, object], what: str, names: ColumnNames) -> str:
    """Return the column of `columns` to read; raise `BadRowError` if it has none."""
    name = find_column(columns, what, names)
    if name is None:
        raise BadRowError(
            f"no {what}: column {' or '.join(map(repr, names[what]))} is absent or null "
            f"(columns found: {listed(columns)}); name it with data.{what}_key"
        )
    return name


def has_column(columns: Mapping[str, object], what: str, names: ColumnNames) -> bool:
    """Whether a row has one of the columns that hold `what`."""
    return any(name in columns for name in names[what])


def find_column(columns: Mapping[str, object], what: str, names: ColumnNames) -> str | None:
    """Return the column of `columns` to read, or None if it has none.

    Raises `BadRowError` if it has several that say different things.
    """
    present = [name for name in names[what] if name in columns]
    if len(present) < 2:
        return present[0] if present else None
    filled = [name for name in present if not is_empty(columns[name])] or present
    for name in filled[1:]:
        if columns[name] != columns[filled[0]]:
            raise BadRowError(
                f"columns '{filled[0]}' and '{name}' could both be the {what}, and differ; "
                f"choose with data.{what}_key={filled[0]} or data.{what}_key={name}"
            )
    return filled[0]


def column_text(columns: Mapping[str, object], name: str | None) -> str:
    """The text of a column; empty where `name` is None."""
    return "" if name is None else text_of(columns[name], where=at(name))


def at(column: str | None) -> str:
    """A column in a message."""
    return f"column '{column}'"
