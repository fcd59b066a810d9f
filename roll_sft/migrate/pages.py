"""The YAML of an imported configuration, with the origin of each line, and the report."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from roll_sft.migrate.draft import OUR_KEYS, Draft


def nested(draft: Draft) -> dict[str, Any]:
    """The values of `draft` by section, as the YAML has them."""
    values = dict[str, Any]()
    for key, (value, _) in draft.lines.items():
        *sections, name = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return values


def as_yaml(draft: Draft, source: Path) -> str:
    """The configuration as YAML, a comment on every line, and the report as comments behind."""
    lines = [
        f"# Imported from {source.name} of {draft.rival}. Run it with:",
        "#   roll-sft train --config-dir FOLDER_OF_THIS_FILE --config-name NAME_OF_THIS_FILE",
        "defaults: [base, _self_]",
    ]
    before: list[str] = []
    for key in (each for each in OUR_KEYS if each in draft.lines):
        value, origin = draft.lines[key]
        *sections, name = key.split(".")
        shared = next(
            (n for n, (a, b) in enumerate(zip(before, sections, strict=False)) if a != b),
            len(before),
        )
        for depth in range(shared, len(sections)):
            lines += [*([""] if depth == 0 else []), f"{'  ' * depth}{sections[depth]}:"]
        before = sections
        lines += _entry("  " * len(sections), name, value, " ".join(origin.split()))
    return "\n".join([*lines, "", *(f"# {line}" for line in report_lines(draft))])


def _entry(indent: str, name: str, value: Any, comment: str) -> list[str]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        rows = [f"{indent}  - {_flow(each)}" for each in value]
        return [f"{indent}{name}:  # {comment}", *rows]
    return [f"{indent}{name}: {_flow(value)}  # {comment}"]


def _flow(value: Any) -> str:
    """`value` on one line of YAML, which reads it back as the same value."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    text = text.removesuffix("\n").removesuffix("\n...")
    # YAML 1.1 reads 1e-05 as text.
    return f"{value:.1e}" if isinstance(value, float) and text.startswith("1e") else text


def report_lines(draft: Draft) -> Iterator[str]:
    """What became of every key of theirs: mapped, not needed, unsupported, left out, unknown."""
    yield f"{draft.rival}: {len(draft.lines)} keys of ours set"
    if draft.used:
        yield "read for these keys, or off there:"
        yield from (f"  {' '.join(each.split())}" for each in draft.used)
    for title, entries in (
        ("not needed", draft.not_needed),
        ("UNSUPPORTED, and what to do", draft.unsupported),
    ):
        if entries:
            yield f"{title}:"
        for name, why in entries.items():
            yield f"  {' '.join(name.split())}  ({why})"
    if draft.secrets:
        yield "left out, since they are secrets:"
        yield from (f"  {name}" for name in draft.secrets)
    if draft.unknown:
        yield f"UNKNOWN keys, which {draft.rival} is not known to have; nothing was made of them:"
        yield from (f"  {name}" for name in draft.unknown)
    if draft.to_set:
        yield "TO SET, before it runs:"
        yield from (f"  {problem}" for problem in draft.to_set)
    if draft.notes:
        yield "notes:"
        yield from (f"  {note}" for note in draft.notes)
