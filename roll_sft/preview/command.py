"""`roll-sft preview`: what a run would learn from its rows, before it is started.

Samples are shown token by token, in the terminal or as a page. Tokens that are trained on are
coloured, control tokens differ from text that spells them, and a dropped row has its place and the
reason. Nothing is written but the page that is asked for.
"""

import logging
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from roll_sft.base.console import stdout_console
from roll_sft.base.errors import ConfigError
from roll_sft.config.schema import DataConfig, RunConfig
from roll_sft.data.chat.chat import ChatTokenizer
from roll_sft.data.chat.pieces import visible
from roll_sft.data.tokens.build_shard import MALFORMED, OVERLONG
from roll_sft.job import prepare
from roll_sft.job.model import load_model, located
from roll_sft.preview.page import page_of
from roll_sft.preview.rows import Choice, Preview, Reader, Shown, look

__all__ = ["Choice", "reader_of", "run"]

LOG = logging.getLogger(__name__)

# Colours of the terminal's own palette, so that they suit light and dark ones.
_SUPERVISED = "bold green"
_CONTROL = "magenta"
_CONTROL_SUPERVISED = "bold green reverse"
_OPEN, _CLOSE = "\u27e6", "\u27e7"  # around what is trained on, where there are no colours


def run(config: RunConfig, choice: Choice, *, page: Path | None) -> None:
    """Show what `choice` asks for, in the terminal or as the HTML file `page`.

    Raises `ConfigError` for a choice that names nothing, `DataError` as a run would.
    """
    if page is not None and not page.absolute().parent.is_dir():
        raise ConfigError(f"--html: there is no folder {page.absolute().parent}; make it first")
    preview = look(reader_of(config), choice)
    summary = _summary(preview, choice, config.data)
    if page is None:
        _show(preview, summary, console=stdout_console())
        return
    text = page_of(preview, title=config.run_name, summary=summary)
    try:
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html: {page} cannot be written ({error.strerror})") from error
    LOG.info("%s; written to %s", summary, page)


def reader_of(config: RunConfig) -> Reader:
    """What reads the rows of `config` and tokenises them. Raises as `run` does."""
    chat, tokenizer = _chat_of(config)
    assert isinstance(tokenizer, PreTrainedTokenizerFast), "a ChatTokenizer refuses any other"
    return Reader(config, prepare.source_options(config.data), chat, tokenizer)


def _chat_of(config: RunConfig) -> tuple[ChatTokenizer, PreTrainedTokenizerBase]:
    """What a run would tokenise with, without its weights or its data.

    Raises `ConfigError` as `prepare` does, and `DataError` for a tokenizer that data cannot use.
    """
    config, hub = located(replace(config, dry_run=True))
    tokenizer = prepare.tokenizer_of(config, load_model(config, hub).shape)
    return prepare.chat_tokenizer(config, tokenizer), tokenizer


def _summary(preview: Preview, choice: Choice, data: DataConfig) -> str:
    rows = f"{preview.num_rows:,} row{'s' * (preview.num_rows != 1)} read"
    shown = f"{len(preview.shown):,} sample{'s' * (len(preview.shown) != 1)} shown"
    counts = ", ".join(f"{number:,} {kind}" for kind, number in preview.num_dropped.most_common())
    what = [rows] if choice.dropped else [rows, shown]
    what.append(f"dropped: {counts}" if counts else "nothing dropped")
    if preview.dropped and len(preview.dropped) < preview.num_dropped.total():
        what.append(f"the first {len(preview.dropped)} of those are listed")
    ends = []
    if preview.num_dropped[MALFORMED] and data.on_bad_row == "error":
        ends.append("; a malformed row ends a run, unless data.on_bad_row=skip")
    if preview.num_dropped[OVERLONG] and data.overlong == "error":
        ends.append("; a sample that is too long ends a run, unless data.overlong=drop or truncate")
    return ", ".join(what) + "".join(ends)


def _show(preview: Preview, summary: str, *, console: Console) -> None:
    has_colours = console.color_system is not None
    for shown in preview.shown:
        console.rule(_title(shown), align="left", style="dim")
        console.print(_body(shown, has_colours=has_colours), soft_wrap=True)
    if preview.dropped:
        table = Table(title="Not trained on", title_justify="left", show_edge=False)
        for column in ("row", "place", "why", "kind"):
            table.add_column(column, overflow="fold")
        for row in preview.dropped:
            name = Text(visible(f"{row.source}:{row.row}"))
            excerpt = f"\n{visible(row.excerpt)}" if row.excerpt else ""
            why = Text.assemble(visible(row.reason), (excerpt, "dim"))
            table.add_row(name, Text(visible(row.place)), why, row.kind)
        console.print(table)
    console.rule(style="dim")
    console.print(Text(summary))
    if preview.shown:
        console.print(_legend(has_colours=has_colours))


def _title(shown: Shown) -> Text:
    part = f" ({shown.part} of {shown.num_parts})" if shown.num_parts > 1 else ""
    share = 100 * shown.num_supervised / shown.num_tokens
    cut = f", cut from {shown.cut_from:,}" if shown.cut_from else ""
    return Text.assemble(
        (visible(f"{shown.source}:{shown.row}{part}"), "bold"),
        (visible(f"  {shown.place}  "), "dim"),
        f"{shown.num_tokens:,} tokens{cut}, {shown.num_supervised:,} trained on ({share:.0f} %)",
    )


def _body(shown: Shown, *, has_colours: bool) -> Text:
    text = Text()
    for is_supervised, pieces in groupby(shown.pieces, key=lambda piece: piece.is_supervised):
        marks = (_OPEN, _CLOSE) if is_supervised and not has_colours else ("", "")
        text.append(marks[0])
        for piece in pieces:
            text.append(visible(piece.text), _style(is_supervised, is_control=piece.is_control))
        text.append(marks[1])
    return text


def _style(is_supervised: bool, *, is_control: bool) -> str:
    if is_control:
        return _CONTROL_SUPERVISED if is_supervised else _CONTROL
    return _SUPERVISED if is_supervised else ""


def _legend(*, has_colours: bool) -> Text:
    if not has_colours:
        return Text(f"{_OPEN}trained on{_CLOSE}")
    return Text.assemble(
        ("trained on", _SUPERVISED),
        "  ",
        ("control token", _CONTROL),
        "  ",
        ("control token, trained on", _CONTROL_SUPERVISED),
    )
