"""A preview as one HTML page that needs nothing beside it: no script, no font, no network.

Every text is escaped by the template engine, and characters that show nothing are named, so a page
runs nothing that a row says. A long context is folded, so that the supervised tokens are on the
screen; a token shows its place and id where it is pointed at, tapped or focused.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import jinja2

from roll_sft.data.chat.pieces import TextPiece, visible
from roll_sft.preview.rows import Preview

# Pieces of context, which nobody learns: how many are shown whole, and of more at each end.
_LONGEST_CONTEXT, _SHOWN = 240, 80

_STYLE = """
:root { color-scheme: light dark; --ground: #fbfbf9; --card: #ffffff; --text: #1c1e21;
  --soft: #686d76; --line: #e2e2dc; --trained: #d3efd9; --trained-text: #0d3b1e; --edge: #8fc9a0;
  --control: #6a3fb5; --control-ground: #efe8fb; --bad: #a32a1f; --bad-ground: #fdecea; }
@media (prefers-color-scheme: dark) { :root { --ground: #15171a; --card: #1d2024; --text: #e4e6e9;
  --soft: #9aa1ab; --line: #31363d; --trained: #1d4a2c; --trained-text: #d4f5de; --edge: #3f8a58;
  --control: #c9aef8; --control-ground: #352a4d; --bad: #ff9d93; --bad-ground: #40211e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 2rem 1.25rem 4rem; background: var(--ground);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
p { margin: .25rem 0; color: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: .5rem 1.25rem; margin: 1rem 0 1.5rem;
  color: var(--soft); font-size: .9rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  margin: 0 0 1.25rem; overflow: hidden; }
header.sample { display: flex; flex-wrap: wrap; justify-content: space-between; gap: .25rem 1rem;
  padding: .7rem 1rem; border-bottom: 1px solid var(--line); font-size: .9rem; }
header.sample b { font-size: 1rem; } header.sample span { color: var(--soft); }
.share { height: 3px; background: var(--line); } .share i { display: block; height: 100%;
  background: var(--edge); }
.tokens { margin: 0; padding: 1rem; white-space: pre-wrap; tab-size: 4; overflow-wrap: anywhere;
  font: .86rem/1.75 ui-monospace, Menlo, Consolas, monospace; }
.tokens span { border-bottom: 1px dotted var(--line); border-radius: 2px; padding: .08rem 0; }
.tokens span:is(:hover, :focus) { outline: 2px solid var(--control); }
.tokens span:is(:hover, :focus)::after { content: attr(data-what); position: fixed; z-index: 1;
  inset: auto 0 0 0; padding: .6rem 1rem; background: var(--text); color: var(--ground);
  font: .9rem/1.4 system-ui, sans-serif; white-space: normal; }
.tokens details { display: inline; }
.tokens summary { display: inline-block; cursor: pointer; margin: .2rem 0; padding: 0 .6rem;
  border: 1px solid var(--line); border-radius: 1rem; color: var(--soft);
  font: .8rem/1.6 system-ui, sans-serif; }
.tokens [open] summary { display: none; }
.legend .l, .tokens .l { background: var(--trained); color: var(--trained-text);
  border-color: var(--edge); }
.legend .c, .tokens .c { color: var(--control); background: var(--control-ground);
  font-weight: 600; }
.legend .c.l, .tokens .c.l { background: var(--trained); box-shadow: inset 0 -2px 0 var(--edge); }
.legend [class] { padding: 0 .4rem; border-radius: 3px; }
table { width: 100%; border-collapse: collapse; background: var(--card); font-size: .9rem;
  border: 1px solid var(--line); border-radius: .6rem; overflow: hidden; }
th { text-align: left; color: var(--soft); font-weight: 500; }
th, td { padding: .55rem .9rem; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
td:nth-child(1) { min-width: 6rem; } td:nth-child(2) { min-width: 11rem; }
@media (max-width: 40rem) { td, tr { display: block; } tr:first-child { display: none; }
  td { border-bottom: 0; padding: .15rem .9rem; }
  tr { border-bottom: 1px solid var(--line); padding: .5rem 0; } }
.scroll { overflow-x: auto; }
tr:last-child td { border-bottom: 0; }
td.kind { white-space: nowrap; } td.kind b { color: var(--bad); background: var(--bad-ground);
  border-radius: 3px; padding: .05rem .4rem; font-weight: 600; }
td small { display: block; color: var(--soft); white-space: pre-wrap; margin-top: .25rem; }
"""

_PAGE = """\
{% macro tokens(pieces) %}{% for piece in pieces %}<span class="{{ "l " if piece.is_supervised }}
{{- "c" if piece.is_control }}" tabindex="0" data-what="{{ what(piece) }}">
{{- visible(piece.text) }}</span>{% endfor %}{% endmacro -%}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}: preview</title>
<style>{{ style|safe }}</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ summary }}</p>
<div class="legend"><span class="l">trained on</span><span class="c">control token</span>
<span class="c l">control token, trained on</span>
<span>point at a token, or tap it, for its place and id</span></div>
{% for sample in preview.shown %}
<article>
<header class="sample"><b>{{ visible(sample.source) }}:{{ sample.row }}
{%- if sample.num_parts > 1 %} ({{ sample.part }} of {{ sample.num_parts }}){% endif %}</b>
<span>{{ visible(sample.place) }}</span>
<span>{{ "{:,}".format(sample.num_tokens) }} tokens
{%- if sample.cut_from %}, cut from {{ "{:,}".format(sample.cut_from) }}{% endif %},
{{ "{:,}".format(sample.num_supervised) }} trained on
({{ "{:.0%}".format(sample.num_supervised / sample.num_tokens) }})</span></header>
<div class="share">
<i style="width: {{ 100 * sample.num_supervised / sample.num_tokens }}%"></i></div>
<div class="tokens">
{%- for run in runs(sample.pieces) %}{{ tokens(run.beginning) }}
{%- if run.middle %}<details><summary>{{ "{:,}".format(run.num_hidden) }} more tokens of context
{#- #}</summary>{{ tokens(run.middle) }}</details>{{ tokens(run.end) }}{% endif %}
{%- endfor -%}
</div>
</article>
{% endfor %}
{% if preview.dropped %}
<h2>Not trained on</h2>
<div class="scroll"><table>
<tr><th>row</th><th>place</th><th>why</th><th></th></tr>
{% for row in preview.dropped %}
<tr><td>{{ visible(row.source) }}:{{ row.row }}</td><td>{{ visible(row.place) }}</td>
<td>{{ visible(row.reason) }}{% if row.excerpt %}<small>{{ visible(row.excerpt) }}</small>
{%- endif %}</td><td class="kind"><b>{{ row.kind }}</b></td></tr>
{% endfor %}
</table></div>
{% endif %}
</body>
</html>
"""


@dataclass(frozen=True, slots=True)
class _Run:
    """Pieces that are all trained on, or all context; `middle` is shown when it is asked for."""

    beginning: tuple[TextPiece, ...]
    middle: tuple[TextPiece, ...] = ()
    end: tuple[TextPiece, ...] = ()

    @property
    def num_hidden(self) -> int:
        """Tokens of the middle."""
        return sum(len(piece.ids) for piece in self.middle)


def page_of(preview: Preview, *, title: str, summary: str) -> str:
    """Return the page, as text to be written in UTF-8."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(_PAGE).render(
        preview=preview,
        title=title,
        summary=summary,
        style=_STYLE,
        visible=visible,
        runs=_runs,
        what=_what,
    )


def _runs(pieces: Sequence[TextPiece]) -> Iterator[_Run]:
    """The pieces of a sample; the middle of a long context apart, to be folded."""
    for is_supervised, group in groupby(pieces, key=lambda piece: piece.is_supervised):
        run = tuple(group)
        if is_supervised or len(run) <= _LONGEST_CONTEXT:
            yield _Run(run)
        else:
            yield _Run(run[:_SHOWN], run[_SHOWN:-_SHOWN], run[-_SHOWN:])


def _what(piece: TextPiece) -> str:
    ids = " ".join(map(str, piece.ids))
    last = piece.start + len(piece.ids) - 1
    place = f"token {last}" if last == piece.start else f"tokens {piece.start}-{last}"
    return f"{place}, id {ids}{', trained on' if piece.is_supervised else ''}"
