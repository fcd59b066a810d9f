"""The console: log lines on stderr, and a command's answer on stdout.

On a terminal a log line begins with the time of day; elsewhere it is plain, with its date. Nothing
here is read by programs: they read `steps.jsonl`.
"""

import logging
import sys
import time

from rich.console import Console
from rich.text import Text

from roll_sft.base.text import printable

CONSOLE = Console(stderr=True, highlight=False)
FILE_WIDTH = 120  # columns of what goes to a file, where 80, which Rich would take, breaks paths
CLOCK = "%H:%M:%S "
STYLES = {logging.WARNING: "yellow", logging.ERROR: "bold red", logging.CRITICAL: "bold red"}


class _Handler(logging.Handler):
    """Prints to the stderr of the moment: the one of the start may be replaced and closed."""

    def emit(self, record: logging.LogRecord) -> None:
        moment, message = time.localtime(record.created), _message(record)
        try:
            if CONSOLE.is_terminal:  # which wraps long lines, so that paths copy whole
                line = Text(time.strftime(CLOCK, moment), style="dim")
                line.append(message, style=f"not dim {STYLES.get(record.levelno, '')}")
                CONSOLE.print(line, soft_wrap=True)  # above the live line
            else:
                stream = sys.stdout if CONSOLE.is_jupyter else sys.stderr
                stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S', moment)} {message}\n")
        except OSError:  # a terminal that is gone must not end a run
            self.handleError(record)


def stdout_console() -> Console:
    """Where a command's answer goes: tables, samples. Names in it are never read as markup."""
    width = None if sys.stdout.isatty() else FILE_WIDTH
    return Console(highlight=False, markup=False, emoji=False, width=width)


def set_up_logging() -> None:
    """Send the package's log to stderr; in a notebook, which paints that red, to stdout."""
    logger = logging.getLogger("roll_sft")
    logger.handlers[:] = [_Handler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _message(record: logging.LogRecord) -> str:
    level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
    return printable(f"{level}{record.getMessage()}")
