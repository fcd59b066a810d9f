"""The driver's console: what stays visible at which width, and what a plain log has."""

import io
import logging
import re
from collections.abc import Callable, Iterator

import pytest
from rich.console import Console

from roll_sft.base import console
from roll_sft.base.metrics import StepRecord, format_seconds
from roll_sft.training import terminal

TOTAL = 450


def record(step: int) -> StepRecord:
    return StepRecord(
        step=step,
        epoch=0.5,
        train_loss=6.1234567,
        grad_norm=1.25,
        learning_rate=3e-3,
        supervised_tokens=1000,
        total_tokens=2000,
        total_tokens_including_padding=2048,
        per_device_tps=12345.6,
        per_device_tps_including_padding=12400.0,
        step_time_s=2.0,
        data_wait_s=0.0,
        mfu=None,
        peak_memory_gib=1.0,
        dp_imbalance=1.0,
        pack_fill=0.59,
        sample_ids_sha256="0" * 64,
    )


Screen = Callable[..., str]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    """Ten steps, shown on a terminal of a width; what was written, control sequences included."""
    logger = logging.getLogger("roll_sft")
    kept = (logger.handlers[:], logger.level, logger.propagate)

    def show(width: int, **options: object) -> str:
        file = io.StringIO()
        shown = Console(file=file, width=width, force_terminal=True, highlight=False, **options)
        monkeypatch.setattr(terminal, "CONSOLE", shown)
        monkeypatch.setattr(console, "CONSOLE", shown)
        console.set_up_logging()
        with terminal.step_display(TOTAL, logging_steps=5) as display:
            for step in range(1, 11):
                display.show(record(step))
        return file.getvalue()

    yield show
    logger.handlers[:], logger.level, logger.propagate = kept


def plain(text: str) -> list[str]:
    """The lines of `text` without its control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()


@pytest.mark.parametrize("width", [60, 80, 200])
def test_step_total_loss_and_time_left_fit_every_terminal(screen: Screen, width: int) -> None:
    lines = plain(screen(width))
    assert max(map(len, lines)) <= width
    logged = [line for line in lines if re.match(r"\d\d:\d\d:\d\d step ", line)]
    live = [line for line in lines if re.match(r"step \d", line)]
    assert [line.split()[2] for line in logged] == ["5/450", "10/450"]
    assert any("━" in line for line in live)
    for line in [*logged, live[-1]]:
        assert re.search(r"step 10?/450|step 5/450", line)
        assert re.search(r"loss 6\.1235 +ETA \d:\d\d:\d\d", line)
    assert ("packs 59 % full" in logged[0]) == (width == 200)


def test_no_color_leaves_no_colours(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    colour = re.compile(r"\x1b\[(?:[0-9;]*;)?[39][0-7]m")
    assert colour.search(screen(80, color_system="standard"))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colour.search(screen(80, color_system="standard"))


def test_without_a_terminal_a_line_is_plain_and_has_everything(
    screen: Screen, capsys: pytest.CaptureFixture[str]
) -> None:
    screen(80)
    terminal.CONSOLE = console.CONSOLE = Console(stderr=True)  # put back by the fixture
    console.set_up_logging()
    with terminal.step_display(TOTAL, logging_steps=5) as display:
        for step in (449, 450):
            display.show(record(step))
    logging.getLogger("roll_sft.training.driver").warning("no such thing")
    last, warned = capsys.readouterr().err.splitlines()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    fields = "step 450/450  loss 6.1235  ETA 0:00:00  12,346 tok/s/device  lr 3.00e-03  grad 1.250"
    assert re.fullmatch(rf"{stamp}{fields}  2\.00 s  packs 59 % full", last)
    assert re.fullmatch(rf"{stamp}warning: no such thing", warned)


def test_a_line_goes_to_the_stderr_of_the_moment(
    screen: Screen, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen(80)
    terminal.CONSOLE = console.CONSOLE = Console(stderr=True)  # put back by the fixture
    with monkeypatch.context() as at_the_start, io.StringIO() as earlier:
        at_the_start.setattr("sys.stderr", earlier)
        console.set_up_logging()
    logging.getLogger("roll_sft.training.driver").warning("no such thing")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(" warning: no such thing")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00:00"), (133, "0:02:13"), (3599.6, "1:00:00"), (97_200, "1 d 03:00:00")],
)
def test_seconds_are_written_as_a_clock_does(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
