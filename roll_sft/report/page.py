"""A report as one HTML page that needs nothing beside it: no script, no font, no network.

The template engine escapes every text and names control characters, so a page runs nothing that a
file of the run says.
"""

from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from roll_sft.base.text import printable
from roll_sft.report import facts
from roll_sft.report.charts import FILLED, Chart, charts_of
from roll_sft.report.drawing import titled
from roll_sft.report.run_files import RunFiles
from roll_sft.report.state import current_state

_TEMPLATE = Path(__file__).with_name("page.html.jinja")


def page_of(runs: Sequence[RunFiles]) -> str:
    """The page about `runs`, one or several, as text to be written in UTF-8."""
    states = [current_state(run) for run in runs]
    tables = [
        *facts.bad_batches(runs),
        *facts.slow_ranks(runs),
        facts.configuration(runs),
        *facts.data(runs),
        facts.environment(runs),
        *facts.starts(runs),
    ]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined, finalize=_clean
    )
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=", ".join(run.name for run in runs),
        runs=[*zip(runs, states, strict=True)],
        summary=facts.summary(runs, states),
        charts=charts_of(runs),
        FILLED=FILLED,
        titled=_titled,
        parts=facts.parts(runs),
        samples=facts.samples(runs),
        tables=[table for table in tables if table is not None],
    )


def _titled(chart: Chart) -> str:
    return titled(chart.svg, name=chart.key, title=printable(chart.title), text=chart.text)


def _clean(value: object) -> object:
    """Texts without credentials and control characters; markup is of the template's own."""
    is_text = isinstance(value, str) and not isinstance(value, Markup)
    return printable(str(value)) if is_text else value
