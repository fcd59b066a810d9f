"""The live line of a run in a notebook: one output that is replaced, so that a saved one is short.

Needs IPython alone, which a kernel has; no widgets.
"""

import html
import time
from typing import Any

SHOW_EVERY_S = 0.25  # a browser draws each update


class NotebookProgress:
    """A bar with a text; the two verbs of Rich's `Progress` that a display needs."""

    def __init__(self) -> None:
        import IPython.display as library

        display: Any = library.display  # Any: IPython leaves it without types
        self._total, self._shown_at = 1, 0.0
        self._handle = display({"text/plain": ""}, raw=True, display_id=True)

    def add_task(self, _name: str, *, total: int, completed: int, text: str) -> int:
        """Show a bar of `total` steps."""
        self._total = total
        self.update(0, completed=completed, text=text)
        return 0

    def update(self, _task: int, *, completed: int, text: str) -> None:
        """Show that `completed` steps are done; the last step always, others now and then."""
        now = time.monotonic()
        if now - self._shown_at < SHOW_EVERY_S and completed < self._total:
            return
        self._shown_at = now
        line = f"step {completed}/{self._total}  {text}"
        bar = f'<progress value="{completed}" max="{self._total}"></progress>'
        shown = {"text/plain": line, "text/html": f"<div>{bar} {html.escape(line)}</div>"}
        self._handle.update(shown, raw=True)
