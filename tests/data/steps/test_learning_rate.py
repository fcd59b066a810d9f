"""The learning rate of every step."""

import math
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import get_scheduler

from roll_sft.config.recipes import ScheduleKind
from roll_sft.config.schema import TrainConfig
from roll_sft.data.steps.learning_rate import Schedule

PEAK = 3e-4
PARAMETERS: dict[str, float] = {
    "polynomial": 2.0,
    "inverse_sqrt": 40,
    "cosine_with_restarts": 3,
}
SMOOTH = tuple(kind for kind in get_args(ScheduleKind) if kind != "cosine_with_restarts")


def train_section(**keys: Any) -> TrainConfig:
    return TrainConfig(
        **{"learning_rate": PEAK, "min_learning_rate": 1e-5, "warmup_ratio": 0.0, **keys}
    )


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    total = draw(st.integers(1, 200))
    kind = draw(st.sampled_from(SMOOTH))
    return Schedule(
        kind=kind,
        peak=PEAK,
        minimum=draw(st.sampled_from([0.0, 1e-5, PEAK])),
        warmup_steps=draw(st.integers(0, 220)),
        total_steps=total,
        decay_steps=draw(st.integers(0, total)),
        parameter=PARAMETERS.get(kind),
    )


def curve(schedule: Schedule) -> list[float]:
    return [schedule.at(step) for step in range(1, schedule.total_steps + 1)]


def hugging_face_curve(
    name: str, *, warmup_steps: int, total_steps: int, **extra: Any
) -> list[float]:
    """What the scheduler of transformers gives at index k - 1, for every step k."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = get_scheduler(
        name, optimizer, warmup_steps, total_steps, scheduler_specific_kwargs=extra or None
    )
    rates = []
    for _ in range(total_steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@settings(deadline=None)
@given(schedules())
def test_the_rate_rises_to_the_peak_then_never_rises(schedule: Schedule) -> None:
    rates = curve(schedule)
    warmup = min(schedule.warmup_steps, schedule.total_steps)
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    after = rates[max(0, warmup - 1) :]
    assert all(a >= b for a, b in pairwise(after))
    assert all(0 < rate <= PEAK for rate in rates)
    floor = schedule.minimum * (1 - 1e-12)  # peak + (minimum - peak) rounds
    assert all(rate >= floor for rate in rates[warmup:])


@settings(deadline=None)
@given(schedules())
def test_warm_up_is_linear_and_its_last_step_has_the_full_rate(schedule: Schedule) -> None:
    assume(schedule.warmup_steps > 0)
    for step in range(1, schedule.warmup_steps + 1):
        assert schedule.at(step) == pytest.approx(PEAK * step / schedule.warmup_steps, rel=1e-15)
    assert schedule.at(schedule.warmup_steps) == PEAK


@settings(deadline=None)
@given(schedules())
def test_the_first_step_after_warm_up_still_has_the_full_rate(schedule: Schedule) -> None:
    assume(schedule.warmup_steps < schedule.total_steps)
    assert schedule.at(schedule.warmup_steps + 1) == PEAK


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_no_step_is_spent_at_the_minimum_and_the_next_would_be(
    kind: str, warmup_steps: int
) -> None:
    schedule = Schedule(kind, PEAK, 1e-5, warmup_steps, total_steps=100, decay_steps=20)
    assert schedule.at(100) > 1e-5
    assert schedule.at(101) == pytest.approx(1e-5, rel=1e-12)


@pytest.mark.parametrize("kind", SMOOTH)
def test_the_rate_has_no_jump(kind: str) -> None:
    parameter = PARAMETERS.get(kind)
    rates = curve(Schedule(kind, PEAK, 0.0, 50, 1000, decay_steps=200, parameter=parameter))
    assert max(abs(a - b) for a, b in pairwise(rates)) <= PEAK / 50 + 1e-12


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("warmup_steps", [0, 7])
def test_cosine_and_linear_are_those_of_transformers_after_warm_up(
    kind: str, warmup_steps: int
) -> None:
    ours = curve(Schedule(kind, PEAK, 0.0, warmup_steps, total_steps=60))
    theirs = hugging_face_curve(kind, warmup_steps=warmup_steps, total_steps=60)
    assert ours[warmup_steps:] == pytest.approx(theirs[warmup_steps:], rel=1e-12)
    # During warm-up we are one step ahead, which spares the step at rate 0.
    assert ours[:warmup_steps] == pytest.approx(theirs[1 : warmup_steps + 1], rel=1e-12)


def test_cosine_with_a_minimum_is_that_of_transformers() -> None:
    ours = curve(Schedule("cosine", PEAK, PEAK / 10, 5, total_steps=60))
    theirs = hugging_face_curve(
        "cosine_with_min_lr", warmup_steps=5, total_steps=60, min_lr_rate=0.1
    )
    assert ours[5:] == pytest.approx(theirs[5:], rel=1e-12)


def test_wsd_is_that_of_transformers_with_a_linear_decay() -> None:
    ours = curve(Schedule("wsd", PEAK, PEAK / 10, 5, total_steps=60, decay_steps=12))
    theirs = hugging_face_curve(
        "warmup_stable_decay",
        warmup_steps=5,
        total_steps=60,
        num_decay_steps=12,
        decay_type="linear",
        min_lr_ratio=0.1,
    )
    assert ours[5:] == pytest.approx(theirs[5:], rel=1e-12)


@pytest.mark.parametrize("warmup_steps", [0, 7])
@pytest.mark.parametrize(
    ("keys", "name", "theirs"),
    [
        ({}, "inverse_sqrt", {}),
        ({"inverse_sqrt_timescale": 20}, "inverse_sqrt", {"timescale": 20}),
        ({"min_learning_rate": 1e-6}, "polynomial", {"lr_end": 1e-6}),
        ({"polynomial_power": 2.5, "min_learning_rate": 1e-5}, "polynomial",
         {"power": 2.5, "lr_end": 1e-5}),
        ({}, "cosine_with_restarts", {}),
        ({"cosine_cycles": 3}, "cosine_with_restarts", {"num_cycles": 3}),
    ],
)  # fmt: skip
def test_the_other_schedules_are_those_of_transformers_after_warm_up(
    keys: dict[str, Any], name: str, theirs: dict[str, Any], warmup_steps: int
) -> None:
    section = train_section(
        **{
            "min_learning_rate": 0.0,
            "lr_scheduler_type": name,
            "warmup_steps": warmup_steps,
            **keys,
        }
    )
    ours = curve(Schedule.of(section, total_steps=60))
    wanted = hugging_face_curve(name, warmup_steps=warmup_steps, total_steps=60, **theirs)
    assert ours[warmup_steps:] == pytest.approx(wanted[warmup_steps:], rel=1e-9, abs=1e-18)
    assert ours[:warmup_steps] == pytest.approx(wanted[1 : warmup_steps + 1], rel=1e-12)


def test_inverse_sqrt_stops_at_the_minimum() -> None:
    rates = curve(Schedule("inverse_sqrt", PEAK, PEAK / 2, 0, total_steps=100, parameter=5))
    assert min(rates) == rates[-1] == PEAK / 2


def test_wsd_stays_at_the_peak_until_its_last_decay_steps() -> None:
    rates = curve(Schedule("wsd", PEAK, 0.0, 0, total_steps=100, decay_steps=10))
    assert rates[:91] == [PEAK] * 91  # the first of the ten decay steps still has the full rate
    assert rates[91:] == pytest.approx([PEAK * (10 - k) / 10 for k in range(1, 10)])


def test_constant_ignores_the_minimum() -> None:
    assert set(curve(Schedule("constant", PEAK, 0.0, 0, total_steps=30))) == {PEAK}


def test_of_rounds_ratios_up() -> None:
    section = train_section(lr_scheduler_type="wsd", warmup_ratio=0.03, wsd_decay_ratio=0.1)
    schedule = Schedule.of(section, total_steps=101)
    assert schedule.warmup_steps == math.ceil(0.03 * 101) == 4
    assert schedule.decay_steps == 11


def test_of_lets_warmup_steps_win_over_the_ratio_even_when_zero() -> None:
    assert Schedule.of(train_section(warmup_steps=0, warmup_ratio=0.5), total_steps=9).at(1) == PEAK


def test_a_warm_up_longer_than_the_run_never_reaches_the_peak() -> None:
    assert Schedule("cosine", PEAK, 0.0, 40, total_steps=20).at(20) == pytest.approx(PEAK / 2)


def test_steps_count_from_one() -> None:
    with pytest.raises(AssertionError, match="step 0"):
        Schedule("cosine", PEAK, 0.0, 0, total_steps=10).at(0)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(AssertionError, match="'exponential'"):
        Schedule("exponential", PEAK, 0.0, 0, total_steps=10)
