"""What a column of a row is for, by its name and the shape of the row.

A column is read, refused, or left aside. It is refused where leaving it out would change what is
trained and there is no clear meaning to read; any other column describes the row, and its name is
reported once for each source.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from roll_sft.base.errors import ConfigError
from roll_sft.data.rows.values import BadRowError, is_empty

Shape = Literal["alpaca", "pairs", "messages", "sharegpt", "text"]

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
_USES: Mapping[Shape, tuple[str, ...]] = {
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
# How much of a row is learnt: 1 or true is what happens anyway.
_WEIGHTS = (
    *("train", "training", "weight", "sample_weight", "loss_weight", "loss_scale", "loss"),
    *("loss_mask", "mask", "masked"),
)

_NO_TEXT = "only text can be trained on: remove it or write it into the text"
_WRITE_IT = "remove it or write it into the text"
_QUERY = "name it with data.query_key={name} to put it after the prompt, or remove it"
_ONE_ANSWER = (
    "one answer is trained on: name it, such as data.response_key=chosen or "
    "data.messages_key=chosen, or remove the others"
)
_NO_EXAMPLE = "false says that the answer is no example to learn from: remove the row"
_WHOLE = (
    "a row is trained on with weight 1: write train, true or false, beside the role of a message, "
    "or give the source a weight"
)


@dataclass(frozen=True, slots=True)
class ColumnKeys:
    """Columns the user named; None leaves that column to detection.

    Raises `ConfigError` if they contradict each other.
    """

    prompt: str | None = None
    query: str | None = None
    response: str | None = None
    system: str | None = None
    messages: str | None = None
    text: str | None = None
    tools: str | None = None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        alone = {"text": {"text"}, "messages": {"messages", "system", "tools"}}
        for what, allowed in alone.items():
            if what in given and not allowed.issuperset(given):
                names = ", ".join(f"data.{name}_key" for name in given)
                raise ConfigError(
                    f"{names} name two shapes for one file; set either data.{what}_key or the "
                    f"others"
                )

    def all_named(self) -> frozenset[str]:
        """Every column that the user named."""
        return frozenset(filter(None, (getattr(self, field.name) for field in fields(self))))

    def optional(self) -> frozenset[str]:
        """The named columns that a row may lack; a source without any is worth a word."""
        return frozenset(filter(None, (self.query, self.system, self.tools)))


# What a column is for -> the names that it may have under given keys.
ColumnNames = Mapping[str, tuple[str, ...]]


@functools.cache
def column_names(keys: ColumnKeys) -> ColumnNames:
    """The names of each use under `keys`: the one that was named, or those it is detected by."""
    named: dict[str, str | None] = {what: getattr(keys, what) for what in KNOWN_COLUMNS}
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
    """What rows of one shape are made of: the `names` of each use, and of the `reasoning`.

    `refused` are the columns that would change what is trained, each with the remedy. `known` are
    all of these: any other column is left aside.
    """

    names: ColumnNames
    reasoning: tuple[str, ...]
    refused: Mapping[str, str]
    known: frozenset[str]


@functools.cache
def column_plan(shape: Shape, keys: ColumnKeys) -> ColumnPlan:
    """The plan for rows of `shape` under `keys`."""
    names, refused = column_names(keys), _refused(shape, keys)
    used = {name for what in _USES[shape] for name in names[what]}
    reasoning = tuple(name for name in REASONING if name not in used and shape == "alpaca")
    own = {HISTORY} if shape == "alpaca" else set()
    template = frozenset() if shape == "text" else _OF_TEMPLATE
    return ColumnPlan(
        names, reasoning, refused, template.union(used, own, reasoning, refused.keys())
    )


@functools.cache
def wanted_columns(keys: ColumnKeys) -> frozenset[str]:
    """Every column whose values some shape reads or judges; a table's others are not read."""
    plans = [column_plan(shape, keys) for shape in _USES]
    return frozenset(keys.all_named()).union(*(plan.known for plan in plans))


def _refused(shape: Shape, keys: ColumnKeys) -> Mapping[str, str]:
    """Columns that would change what is trained, each with the remedy, without those named."""
    refused: dict[str, str] = dict.fromkeys(_MEDIA, _NO_TEXT)
    if shape == "text":
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
    if shape in ("messages", "sharegpt", "pairs"):
        refused[HISTORY] = _WRITE_IT
    if shape in ("alpaca", "pairs") and keys.query is None:
        refused |= {name: _QUERY.format(name=name) for name in _CONTEXT}
    return {name: remedy for name, remedy in refused.items() if name not in keys.all_named()}


def check_columns(columns: Mapping[str, object], *, plan: ColumnPlan, shape: Shape) -> None:
    """Raise `BadRowError` for a column that would change what is trained if it were left out."""
    if plan.refused.keys().isdisjoint(columns):
        return
    for name, remedy in plan.refused.items():
        value = columns.get(name)
        if not is_empty(value) and not _is_neutral(name, value):
            raise BadRowError(
                f"column '{name}' has no place beside the {shape} columns, and leaving it out "
                f"would change what is trained; {remedy}"
            )


def _is_neutral(name: str, value: object) -> bool:
    """Whether a column that could change what is trained does not."""
    if name in _VERDICTS:
        return value is not False
    if name == "masked":
        return value is False
    return name in _WEIGHTS and isinstance(value, int | float) and value == 1
