"""`roll-sft sync RUN ...`: send to the trackers of a run what they lack of it.

Reads the folder of the run alone. Needs that no other process holds the folder: a run that is going
on sends by itself.
"""

import argparse
import sys
from pathlib import Path

from roll_sft.base.console import set_up_logging
from roll_sft.base.errors import ConfigError, report
from roll_sft.base.text import redacted
from roll_sft.config.build import build_config
from roll_sft.config.composed import stored_values
from roll_sft.config.schema import RunConfig
from roll_sft.tracking.run_record import read_record
from roll_sft.tracking.trackers import RecordedRun, Status, check_trackers, open_recorders
from roll_sft.training.run_folder import claimed

_STATUSES: dict[str, Status] = {"FINISHED": "FINISHED", "FAILED": "FAILED"}
# All that is there is sent; the last checkpoint is of no interest.
_END = 2**62


def main(arguments: list[str] | None = None, *, program: str | None = None) -> int:
    """The command line; returns the exit code, the cause as the last line on stderr."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Send to the trackers of a run what they lack: points that a server missed.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run")
    options = parser.parse_args(arguments)
    try:
        set_up_logging()
        for run in options.runs:
            for line in sync(run):
                sys.stdout.write(f"{line}\n")
    except Exception as error:  # noqa: BLE001 -- the door: everything ends in an exit code
        return report(error)
    return 0


def sync(folder: Path) -> list[str]:
    """Send the run in `folder` to each of its trackers; returns a line for each.

    Raises `ConfigError` for a folder that is no run, or is in use, and `ResourceError` where a
    tracker does not answer.
    """
    config = config_of(folder)
    if not config.tracking.services:
        return [f"{folder}: tracking.backends names no tracker besides jsonl; nothing to send"]
    check_trackers(config)
    lines = []
    with claimed(folder, resumes=True) as own:
        record, facts, status = read_record(own)
        run = RecordedRun(config, own, continues=True, start_step=_END)
        for recorder, tracker in open_recorders(run, record, facts=lambda: facts):
            # A run that never wrote how it ended was killed.
            recorder.send_all(_STATUSES.get(status, "KILLED"))
            refused = f", without {', '.join(sorted(recorder.warned))}" if recorder.warned else ""
            lines.append(redacted(f"{folder}: sent to {tracker.title}{refused}"))
    return lines


def config_of(folder: Path) -> RunConfig:
    """The configuration that the run in `folder` was started with.

    Raises `ConfigError` for a folder without one, or one of another version.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder}: has no config.yaml, so it is no run; give an output_dir")
    return build_config(stored_values(path))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
