"""`roll-sft report RUN [RUN ...]`: a page about a run, or about several beside each other.

Of one run it writes `report.html` and `loss.png` into the run's folder, also while the run goes on;
of several `report.html` in the current folder. A run calls this at its end, as a process.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from roll_sft.base.errors import ConfigError, RollSftError, report
from roll_sft.base.files import write_durably
from roll_sft.report import REPORT


def main(arguments: Sequence[str] | None = None, *, program: str = "roll-sft report") -> int:
    """Make the report that `arguments` ask for; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="A page of a run's curves, samples, configuration and end; of several runs,"
        " beside each other.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="default: report.html in the folder of the run, or of several in the current folder",
    )
    options = parser.parse_args(arguments)
    try:
        page = make(options.runs, options.output)
    except (RollSftError, OSError) as error:
        return report(error)
    sys.stdout.write(f"{page}\n")
    return 0


def make(folders: Sequence[Path], output: Path | None) -> Path:
    """Write the page about the runs in `folders`; returns where it is. Raises `ConfigError`."""
    # Charts need matplotlib, which takes a second to import.
    from roll_sft.report.page import page_of
    from roll_sft.report.run_files import read_run

    runs = [read_run(folder) for folder in folders]
    page = output or (folders[0] / REPORT if len(folders) == 1 else Path(REPORT))
    text = page_of(runs)
    try:
        write_durably(page, text)
    except OSError as error:
        raise ConfigError(
            f"--output: {str(page)!r} cannot be written ({error.strerror}); give another file"
        ) from error
    if len(folders) == 1 and output is None:
        from roll_sft.report.loss_curve import draw_losses

        draw_losses(runs[0])
    return page


if __name__ == "__main__":
    sys.exit(main())
