"""Learning rate, weight decay and momentum: where they begin, where they end, and how they get there."""

import dataclasses
import math
from itertools import pairwise

import pytest

from wejepa.config import OptimizerConfig
from wejepa.train.schedules import Schedule, cosine, linear


def make(epochs: int = 10, warmup: float = 2.0, steps: int = 50) -> tuple[Schedule, int, int]:
    """A schedule, its number of steps and the number of those that warm up."""
    cfg = OptimizerConfig(
        epochs=epochs,
        warmup_epochs=warmup,
        start_learning_rate=1e-4,
        base_learning_rate=2e-3,
        final_learning_rate=1e-5,
        weight_decay=0.04,
        final_weight_decay=0.4,
        momentum_teacher=0.9,
        momentum_teacher_final=1.0,
    )
    return Schedule(cfg, steps), epochs * steps, round(warmup * steps)


@pytest.mark.parametrize(("epochs", "warmup", "steps"), [(10, 2.0, 50), (1, 0.0, 40), (1, 0.5, 40), (300, 15.0, 7), (3, 0.0, 1)])
def test_ends(epochs, warmup, steps):
    schedule, total, rising = make(epochs, warmup, steps)
    first, last = schedule(0), schedule(total - 1)
    assert first.learning_rate == pytest.approx(1e-4 if rising else 2e-3)
    assert schedule(rising).learning_rate == pytest.approx(2e-3)
    assert last.learning_rate == pytest.approx(1e-5)
    assert (first.weight_decay, last.weight_decay) == pytest.approx((0.04, 0.4))
    assert (first.momentum, last.momentum) == pytest.approx((0.9, 1.0))


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine():
    schedule, total, rising = make()
    rates = [schedule(step).learning_rate for step in range(total)]
    for step in range(rising):
        assert rates[step] == pytest.approx(1e-4 + (2e-3 - 1e-4) * step / rising)
    falling = rates[rising:]
    assert all(a > b for a, b in pairwise(falling))
    for i, rate in enumerate(falling):
        assert rate == pytest.approx(1e-5 + (2e-3 - 1e-5) * (1 + math.cos(math.pi * i / (len(falling) - 1))) / 2)
    assert max(rates) == pytest.approx(2e-3)


def test_momentum_and_decay_only_rise():
    schedule, total, _ = make()
    settings = [schedule(step) for step in range(total)]
    for name, low, high in (("momentum", 0.9, 1.0), ("weight_decay", 0.04, 0.4)):
        values = [getattr(s, name) for s in settings]
        assert all(a < b for a, b in pairwise(values))
        assert values[len(values) // 2] == pytest.approx((low + high) / 2, rel=0.02)


def test_momentum_and_decay_may_rise_in_a_line():
    schedule, total, _ = make()
    other = Schedule(dataclasses.replace(schedule.cfg, momentum_schedule="linear", weight_decay_schedule="linear"), 50)
    for step in range(total):
        share = step / (total - 1)
        assert other(step).momentum == pytest.approx(0.9 + 0.1 * share)
        assert other(step).weight_decay == pytest.approx(0.04 + 0.36 * share)
        assert other(step).learning_rate == schedule(step).learning_rate
    assert other(total + 1000) == other(total - 1)
    one = Schedule(dataclasses.replace(schedule.cfg, momentum_schedule="linear"), 50)
    assert one(100).weight_decay == schedule(100).weight_decay and one(100).momentum == other(100).momentum


def test_a_schedule_depends_on_the_step_alone():
    one, _, _ = make()
    other, _, _ = make()
    for step in (70, 3, 499):
        assert one(step) == other(step) == one(step)


def test_a_run_that_only_warms_up():
    schedule, total, _ = make(epochs=2, warmup=2.0, steps=10)
    rates = [schedule(step).learning_rate for step in range(total)]
    assert all(a < b for a, b in pairwise(rates)) and rates[-1] < 2e-3


def test_a_run_of_one_step():
    schedule, _, _ = make(epochs=1, warmup=0.0, steps=1)
    only = schedule(0)
    assert (only.learning_rate, only.weight_decay, only.momentum) == pytest.approx((2e-3, 0.04, 0.9))


def test_beyond_the_end_nothing_moves_any_more():
    schedule, total, _ = make()
    assert schedule(total + 1000) == schedule(total - 1)


def test_linear():
    assert [linear(progress, 3.0, 1.0) for progress in (-1.0, 0.0, 0.25, 1.0, 2.0)] == [3.0, 3.0, 2.5, 1.0, 1.0]


def test_cosine():
    assert cosine(0.0, 3.0, 1.0) == 3.0 and cosine(1.0, 3.0, 1.0) == pytest.approx(1.0)
    assert cosine(0.5, 3.0, 1.0) == pytest.approx(2.0)
    assert cosine(0.25, 3.0, 1.0) == pytest.approx(1 + (1 + math.sqrt(0.5)))
    assert cosine(-1.0, 3.0, 1.0) == 3.0 and cosine(2.0, 3.0, 1.0) == pytest.approx(1.0)
