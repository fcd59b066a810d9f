"""The text of `--help` and of docs/configuration.md: every key of the schema, explained.

`python -m roll_sft.config.reference > docs/configuration.md` writes the page.
"""

import dataclasses
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from roll_sft.config.debug import FaultConfig
from roll_sft.config.evaluation import PromptSource
from roll_sft.config.fields import (
    Key,
    all_keys,
    all_names,
    choices_of,
    one_or_list,
    section_of,
    without_null,
)
from roll_sft.config.schema import RunConfig, SourceConfig

_INTRODUCTION = """\
# Configuration

Every key of a run. Give one as `section.key=value` on the command line, or as a key of a YAML
file. `--help` prints the same list. A number that breaks its range, a text that is not among the
choices and a key that is not listed here are refused before anything starts.
"""
_INDENT = "      "
# title -> the entries of a list
_LISTS = {"sources": SourceConfig, "prompt sources": PromptSource, "faults": FaultConfig}


def page() -> str:
    """docs/configuration.md."""
    parts = [_INTRODUCTION]
    for title, about, keys in _groups():
        rows = [
            f"| `{each.name}` | {_takes(each)} | `{_written(each.default)}` |"
            f" {_escaped(each.sentence)} |"
            for each in keys
        ]
        head = f"## {title}\n\n{about}\n\n| key | takes | default | meaning |\n|---|---|---|---|"
        parts.append("\n".join([head, *rows, ""]))
    return "\n".join(parts)


def help_text(*, width: int) -> str:
    """Every key for a terminal of `width` columns."""
    lines = []
    for title, about, keys in _groups():
        lines += ["", f"{title}: {about}"]
        for each in keys:
            head = f"  {each.name}={_written(each.default)}  ({_takes(each)})"
            lines += textwrap.wrap(head, width=width, subsequent_indent=_INDENT)
            lines += textwrap.wrap(
                each.sentence, width=width, initial_indent=_INDENT, subsequent_indent=_INDENT
            )
    return "\n".join(lines[1:]) + "\n"


def _groups() -> Iterator[tuple[str, str, list[Key]]]:
    """(title, what it is about, keys) of the run's own keys and of each section."""
    keys = list(all_keys(RunConfig))
    lists = {each.name for each in keys}  # whose entries have keys of their own
    yield "run", _about(RunConfig), [each for each in keys if "." not in each.name]
    for item in dataclasses.fields(RunConfig):
        if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
            mine = (each for each in keys if each.name.startswith(f"{item.name}."))
            own = [each for each in mine if each.name.rpartition(".")[0] not in lists]
            inherited = {name for base in item.type.__mro__[1:-1] for name in all_names(base)}
            own.sort(key=lambda each: each.name.rpartition(".")[2] in inherited)
            yield item.name, _about(item.type), own
    for title, entry in _LISTS.items():
        yield title, _about(entry), list(all_keys(entry))


def _about(section: type) -> str:
    return (section.__doc__ or "").splitlines()[0]


def _takes(each: Key) -> str:
    """What the key takes: its choices, or its type, unit and range."""
    inner, is_optional = without_null(each.kind)
    if (either := one_or_list(inner)) is not None:
        one, many = (", ".join(choices_of(part)) for part in either)
        words = f"one of {one}, or list of {many}"
    elif each.choices:
        words = ", ".join(each.choices)
        words = f"list of {words}" if get_origin(inner) is list else f"one of {words}"
    elif (entry := section_of(inner)) is not None:
        title = next(title for title, each in _LISTS.items() if each is entry)
        words = f"list of {'' if entry in get_args(inner) else 'texts and '}{title}"
    else:
        words = _type_in_words(inner)
    words += f", {each.unit}" if each.unit else ""
    words += _range(each)
    return f"{words}, or null" if is_optional else words


def _type_in_words(kind: Any) -> str:
    names = {bool: "true or false", int: "integer", float: "number", str: "text"}
    if get_origin(kind) is list:
        (inner,) = get_args(kind)
        return f"list of {names[inner]}"
    return names.get(kind, "mapping")


def _range(each: Key) -> str:
    """The bounds of a number, such as ", 0 to 1"."""
    low, above, high = (each.about[name] for name in ("at_least", "above", "at_most"))
    if low is not None and high is not None:
        return f", {low:.10g} to {high:.10g}"
    words = [
        "" if low is None else f", at least {low:.10g}",
        "" if above is None else f", above {above:.10g}",
        "" if high is None else f", at most {high:.10g}",
    ]
    return "".join(words)


def _written(value: object) -> str:
    """A default as the command line takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    return str(value)


def _escaped(text: str) -> str:
    """`text` in one cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.stdout.write(page())
