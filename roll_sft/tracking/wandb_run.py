"""One run in Weights & Biases: a `Tracker`. The package is imported when the record is opened.

The server and the account are W&B's own settings: WANDB_MODE (online, offline), WANDB_BASE_URL,
WANDB_ENTITY, and the key of `wandb login` or WANDB_API_KEY. Its files lie in the folder `wandb` of
the run. W&B takes steps in order only, and keeps the row of a step open until the next one.

Promise: neither the command line, nor the console, nor environment or code is recorded.
"""

import atexit
import contextlib
import netrc
import secrets
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from roll_sft.base.errors import ConfigError
from roll_sft.tracking.journal import Record
from roll_sft.tracking.run_facts import RunFacts
from roll_sft.tracking.run_record import Note, read_note
from roll_sft.tracking.sample_table import table_of
from roll_sft.tracking.trackers import FINISHED, RecordedRun, Request, Status

NOTE = ".wandb_run"
OPEN_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 25.0  # below Recorder's, which waits for it
EXIT_CODES = {"FINISHED": 0, "FAILED": 1, "KILLED": 130}


def check_credentials() -> None:
    """Raise `ConfigError` where W&B is online and has no key: it would ask for one."""
    settings = _set_up().setup().settings
    is_online = settings.mode in ("online", "run", "shared")
    if is_online and not (settings.api_key or settings.identity_token_file):
        host = urlsplit(settings.base_url).hostname or ""
        try:
            known = netrc.netrc().authenticators(host)
        except (OSError, netrc.NetrcParseError):
            known = None
        if known is None:
            raise ConfigError(
                f"tracking.backends: wandb has no key for {host}; run `wandb login`, set"
                " WANDB_API_KEY, or set WANDB_MODE=offline"
            )


class WandbRun:
    """The W&B run of a run. One that continues goes on in the W&B run that its folder names."""

    name = "wandb"

    def __init__(self, run: RecordedRun) -> None:
        self._run = run
        self.title = "Weights & Biases"
        self._recorded = -1  # all up to this step is in the W&B run
        self._step = -1  # the last that was sent, whose row is open
        self._wandb: Any = None
        self._wandb_run: Any = None

    def open(self) -> None:
        """Begin or resume the W&B run. Raises where a server does not answer."""
        self._wandb = wandb = _set_up()
        folder, config = self._run.folder, self._run.config
        note = read_note(folder / NOTE) if self._run.continues else None
        run_id = note.run_id if note else secrets.token_hex(4)
        is_offline = wandb.setup().settings.mode in ("offline", "dryrun")
        self._wandb_run = wandb.init(
            project=config.tracking.experiment,
            name=config.run_name,
            id=run_id,
            dir=str(folder),
            resume=None if is_offline else "allow",  # W&B refuses it without a server
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_code=True,
                disable_git=True,
                save_code=False,
                x_disable_meta=True,
                x_save_requirements=False,
                reinit="create_new",
                init_timeout=OPEN_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
                finish_timeout_raises=True,
            ),
        )
        # W&B tells its service of later imports, within the import: without the service it fails.
        with contextlib.suppress(AttributeError):  # the method is not public
            self._wandb_run._unregister_telemetry_import_hooks(run_id)
        # A server knows what it has. Of files, only the note says what they hold.
        if self._wandb_run.resumed:
            self._recorded = self._wandb_run.starting_step - 1
        elif note is not None and is_offline:
            self._recorded = note.step
        self._note(self._recorded)

    def describe(self, facts: RunFacts) -> Iterator[Request]:
        """Parameters, tags and data sets, as the configuration of the W&B run."""
        known = {
            **facts.params,
            "tags": dict(facts.tags),
            "data_sets": {
                f"{each.context}/{each.name}": {"digest": each.digest, **each.profile}
                for each in facts.inputs
            },
        }
        update = self._wandb_run.config.update
        yield self._request("parameters", partial(update, known, allow_val_change=True))

    def send(self, records: Sequence[Record]) -> Iterator[Request]:
        """Metrics of each step, and its samples as a table."""
        lacking = [record for record in records if record.step > self._recorded]
        for record in lacking:
            yield self._request("metrics", partial(self._log, record))
        if lacking:
            self._note(self._step - 1)

    def finish(self, status: Status) -> Iterator[Request]:
        """Send what is left and end the W&B run."""
        finish = partial(self._wandb_run.finish, exit_code=EXIT_CODES[status])
        yield self._request("status", finish)
        self._note(max(self._step, self._recorded), is_finished=status == FINISHED)

    def is_refused(self, error: Exception) -> bool:
        """Whether W&B found the values themselves, or the account, wrong."""
        from wandb.errors import AuthenticationError, UsageError

        return isinstance(error, AuthenticationError | UsageError | TypeError | ValueError)

    def was_finished(self) -> bool:
        """Whether the note says so."""
        note = read_note(self._run.folder / NOTE)
        return note is not None and note.is_finished

    def _request(self, kind: str, call: Callable[[], object]) -> Request:
        def make() -> None:
            try:
                call()
            except Exception as error:
                if not self.is_refused(error):
                    # Hooks run in the reverse order: before W&B's own, which it replaces.
                    atexit.unregister(_end_service)
                    atexit.register(_end_service)
                raise

        return Request(kind, make)

    def _log(self, record: Record) -> None:
        values: dict[str, Any] = {each.name: each.value for each in record.points}
        if record.samples:
            head, *rows = table_of(record.samples)
            values["generations"] = self._wandb.Table(columns=head, data=rows)
        self._wandb_run.log(values, step=record.step)
        self._step = record.step

    def _note(self, step: int, *, is_finished: bool = False) -> None:
        note = Note(str(self._wandb_run.id), step, is_finished)
        note.write(self._run.folder / NOTE)


def _set_up() -> Any:
    """The package, which says nothing on the console."""
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    return wandb


def _end_service() -> None:
    """End W&B's service, without a word.

    A signal to all processes of a job ends it with us, and W&B's own hook would write a traceback
    behind our last line.
    """
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()
