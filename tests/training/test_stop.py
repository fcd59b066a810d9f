"""Requests to end a run: which signals are one, what they interrupt, and when the grace is over."""

import importlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from roll_sft import signals as signals_module
from roll_sft.base.errors import ConfigError, PreemptedError
from roll_sft.config.build import build_config
from roll_sft.config.keeping import seconds_of
from roll_sft.config.schema import RunConfig
from roll_sft.config.validate import check_config
from roll_sft.signals import SIGNALS, noted_signals, stoppable
from roll_sft.training.stop import Stop

LONG_S = 60.0  # of a sleep that a signal has to end


def config(*, grace_s: float = 30.0, **train: Any) -> RunConfig:
    return build_config({"cluster": {"grace_s": grace_s}, "train": train})


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def interrupt(stop: Stop, outlook: str, *numbers: int) -> None:
    """Send signals to what would last for long."""
    stop.outlook = outlook
    send(*numbers)
    time.sleep(LONG_S)


@pytest.fixture(autouse=True)
def _no_ray_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_interrupts_what_has_nothing_to_save(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in (*SIGNALS, signal.SIGALRM)]
    with (
        pytest.raises(PreemptedError, match=f"^ended by {number.name}: what is prepared stays$"),
        stoppable(config()) as stop,
    ):
        interrupt(stop, "what is prepared stays", number)
    assert [signal.getsignal(each) for each in (*SIGNALS, signal.SIGALRM)] == before


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGTERM, signal.SIGINT]])
@pytest.mark.parametrize("is_command_known", [True, False])
def test_a_signal_interrupts_no_import(
    numbers: list[int], is_command_known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals_module, "REPEAT_S", 0.0)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"imported_{len(numbers)}_{is_command_known}"
    (tmp_path / f"{name}.py").write_text(
        "import time\nfrom tests.training.test_stop import send\n"
        f"send(*{[int(each) for each in numbers]})\ntime.sleep(0.2)\nis_whole = True\n"
    )

    def work() -> None:
        importlib.import_module(name)
        time.sleep(LONG_S)

    if is_command_known:
        ended = pytest.raises((PreemptedError, SystemExit))
        with ended as caught, stoppable(config()):
            work()
        assert isinstance(caught.value, SystemExit) == (len(numbers) == 2)
    else:
        with pytest.raises(KeyboardInterrupt), noted_signals() as noted:
            work()
        assert noted == numbers
    assert sys.modules[name].is_whole


def test_a_signal_that_waits_for_an_import_is_not_lost_where_the_run_begins(tmp_path: Path) -> None:
    (tmp_path / "brief.py").write_text(
        f"from tests.training.test_stop import send\nsend({int(signal.SIGTERM)})\n"
    )
    with pytest.MonkeyPatch.context() as patch, noted_signals() as noted:
        patch.syspath_prepend(tmp_path)
        patch.setattr(signals_module, "IMPORT_S", LONG_S)
        importlib.import_module("brief")
        with pytest.raises(KeyboardInterrupt), stoppable(config()):
            pass
    assert noted == [signal.SIGTERM]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0), "the block has ended"


def test_while_it_trains_signals_at_once_are_one_request_that_is_noted() -> None:
    def train() -> None:
        assert not stop.is_asked()
        send(signal.SIGTERM, signal.SIGTERM, signal.SIGHUP)
        assert stop.is_asked()
        stop.outlook = "step 4 is kept"

    with (
        pytest.raises(PreemptedError, match=r"^ended by SIGTERM: step 4 is kept$"),
        stoppable(config()) as stop,
        stop.deferred(),
    ):
        train()


def test_a_second_signal_ends_at_once_with_its_own_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signals_module, "REPEAT_S", 0.0)
    with pytest.raises(SystemExit) as caught, stoppable(config()) as stop, stop.deferred():
        interrupt(stop, "step 4 is kept", signal.SIGTERM, signal.SIGINT)
    assert caught.value.code == 130
    assert capsys.readouterr().err == "ended by a second signal, SIGINT: step 4 is kept\n"


def test_a_signal_after_another_kind_of_request_does_not_interrupt_the_save(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signals_module, "REPEAT_S", 0.0)

    def train() -> None:
        stop.ask("the node leaves")
        send(signal.SIGTERM)
        stop.outlook = "step 4 is kept"

    with (
        pytest.raises(PreemptedError, match=r"^the node leaves: step 4 is kept$"),
        stoppable(config()) as stop,
        stop.deferred(),
    ):
        train()


def test_where_the_grace_is_over_the_training_is_interrupted() -> None:
    with (
        pytest.raises(PreemptedError, match=r"^ended by SIGUSR1: cluster\.grace_s=1 was too short"),
        stoppable(config(grace_s=1)) as stop,
        stop.deferred(),
    ):
        interrupt(stop, "", signal.SIGUSR1)


def test_a_run_that_does_not_end_is_ended_when_the_grace_is_over() -> None:
    program = """
import os, signal, time
from roll_sft.config.build import build_config
from roll_sft.signals import stoppable
with stoppable(build_config({"cluster": {"grace_s": 1}})) as stop:
    stop.outlook = "step 4 is kept"
    os.kill(os.getpid(), signal.SIGTERM)
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass  # as an end that hangs
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (75, "ended by SIGTERM: step 4 is kept\n")


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable(config()) as stop:
            send(signal.SIGHUP)
        assert stop.reason is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_sets_no_handler_and_is_still_asked() -> None:
    found: list[Any] = []

    def run() -> None:
        with stoppable(config()) as stop:
            found.append([signal.getsignal(each) for each in SIGNALS])
            stop.ask("the node leaves")
            found.append(stop.is_asked())

    before = [signal.getsignal(each) for each in SIGNALS]
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before, True]


def test_the_limit_of_time_is_a_request_the_grace_before_it() -> None:
    with (
        pytest.raises(PreemptedError, match=r"^train\.max_duration ends: "),
        stoppable(config(grace_s=1.9, max_duration="2s")),
    ):
        time.sleep(LONG_S)


def test_under_a_ray_job_the_grace_is_what_its_supervisor_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with stoppable(config()) as stop:
        assert stop.grace_s == pytest.approx(2.7)
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "20")
    with stoppable(config()) as stop:
        assert stop.grace_s == pytest.approx(18)
    with stoppable(config(grace_s=5)) as stop:
        assert stop.grace_s == 5


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5400", 5400), ("1h30m", 5400), ("90m", 5400), ("1h 1s", 3601), ("0.5h", 1800), ("10s", 10)],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "1d", "h", "1.2.3h", "30m1h", "-5", "1:30:00"])
def test_other_texts_are_no_durations(text: str) -> None:
    assert seconds_of(text) is None


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"max_duration": "1d"}, r"train\.max_duration: '1d' is no duration"),
        (
            {"max_duration": "1m"},
            r"train\.max_duration: 1m leaves no time .* cluster\.grace_s=60\b",
        ),
        ({"on_spike": "skip", "spike_sigma": None}, r"train\.on_spike: skip .*spike_sigma=null"),
    ],
)
def test_wrong_values_are_refused(train: dict[str, Any], message: str) -> None:
    given = build_config({"train": train})
    with pytest.raises(ConfigError) as caught:
        check_config(given)
    assert re.search(message, str(caught.value))
