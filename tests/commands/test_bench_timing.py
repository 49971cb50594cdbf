"""How the benchmark measures a case: in turns, its answers compared, with gaps where none is."""

import dataclasses
import sys
import time
import types
import weakref

import jax
import numpy as np
import pytest

import xentjax
from xentjax._commands.bench import cases, contenders, timing
from xentjax._commands.bench.cases import Case, Size
from xentjax._commands.bench.timing import Outcome

PLAN = dataclasses.replace(cases.QUICK, rounds=1)
EAGER = Case("eager", "small", Size(8, 5), "float32", "value")
HEAD = Case("head", "language", Size(16, 40, 4), "float32", "gradient")


def test_a_gradient_in_bfloat16_is_rounded():
    outcome = Outcome(value_difference=0.0, gradient_difference=5e-3)
    assert outcome.is_wrong("float32")
    assert not outcome.is_wrong("bfloat16")
    assert Outcome(value_difference=5e-3).is_wrong("bfloat16")


def test_without_pytorch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    measurement = timing.measure(EAGER, PLAN)
    assert measurement.outcomes["torch"] == Outcome(problem="not installed")
    assert len(measurement.outcomes["xentjax"].seconds) == 1


@pytest.mark.parametrize("has_cuda", [True, False])
def test_pytorch_elsewhere(monkeypatch, has_cuda):
    """Where JAX has a GPU, PyTorch must have it too."""
    torch = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: has_cuda))
    assert timing._why_not("torch", torch) is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    expected = None if has_cuda else "not on this device"
    assert timing._why_not("torch", torch) == expected
    assert timing._why_not("tokamax", types.SimpleNamespace()) is None


def test_a_package_without_the_function(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", types.ModuleType("tokamax"))
    contender = contenders.CONTENDERS["head"]["tokamax"]
    assert isinstance(contender, contenders.Foreign)
    assert contender.load() is None


def fake_tokamax(factor):
    """Returns a module with tokamax's function, its result times `factor`."""
    module = types.ModuleType("tokamax")

    def loss(x, labels, weights, *, reduction, implementation):
        assert (reduction, implementation) == ("mean", "chunked_xla")
        return factor * xentjax.softmax_cross_entropy(x @ weights, labels).mean()

    module.linear_softmax_cross_entropy_loss = loss
    return module


@pytest.mark.parametrize("factor", [1, 1.001])
def test_answers_are_compared(monkeypatch, factor):
    monkeypatch.setitem(sys.modules, "tokamax", fake_tokamax(factor))
    everyone = contenders.CONTENDERS["head"]
    monkeypatch.setitem(
        contenders.CONTENDERS,
        "head",
        {name: everyone[name] for name in ("xentjax", "optax", "tokamax")},
    )
    outcome = timing.measure(HEAD, PLAN).outcomes["tokamax"]
    assert outcome.value_difference == pytest.approx(factor - 1, abs=1e-6)
    assert outcome.gradient_difference == pytest.approx(factor - 1, abs=1e-6)
    assert outcome.is_wrong("float32") == (factor != 1)


def test_out_of_memory_is_a_gap_and_other_errors_are_not(monkeypatch):
    def fail(z, y):
        raise RuntimeError(message)

    everyone = {"xentjax": xentjax.softmax_cross_entropy, "optax": fail}
    monkeypatch.setitem(contenders.CONTENDERS, "eager", everyone)
    message = "RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes"
    outcomes = timing.measure(EAGER, PLAN).outcomes
    assert outcomes["optax"].problem == "out of memory"
    assert outcomes["xentjax"].value_difference is None  # There is nothing to compare it with.
    message = "INTERNAL: a bug"
    with pytest.raises(RuntimeError, match="a bug"):
        timing.measure(EAGER, PLAN)


def plan(**changes):
    return dataclasses.replace(PLAN, **({"patience": 60} | changes))


class Result:
    """Something that a weak reference can be to."""


def test_samples_take_turns_and_no_result_outlives_its_own():
    alive, order = weakref.WeakSet(), []

    def contender(name):
        def call():
            assert not alive
            order.append(name)
            result = Result()
            alive.add(result)
            return result, ()

        return call

    calls = {name: contender(name) for name in "abc"}
    outcomes = {name: Outcome() for name in calls}
    count = timing._sample(calls, outcomes, plan(rounds=5, sample=1e-12, patience=0))
    assert count == dict.fromkeys("abc", 1)
    # Once to see how long a call takes, then three rounds: after those there is no patience.
    assert "".join(order) == "abc" + "cba" + "abc" + "cba"
    assert [len(outcome.seconds) for outcome in outcomes.values()] == [3, 3, 3]


def test_a_long_call_is_the_only_sample(monkeypatch):
    monkeypatch.setattr(timing, "LONG", 0.5)
    called = {"short": 0, "long": 0}

    def contender(name, seconds):
        def call():
            called[name] += 1
            time.sleep(seconds)
            return (), ()

        return call

    calls = {"short": contender("short", 0), "long": contender("long", 0.51)}
    outcomes = {name: Outcome() for name in calls}
    assert timing._sample(calls, outcomes, plan(rounds=2, sample=1e-12)) == {"short": 1, "long": 1}
    assert called == {"short": 3, "long": 1}
    assert len(outcomes["short"].seconds) == 2
    (seconds,) = outcomes["long"].seconds
    assert seconds >= 0.51


def test_short_calls_are_repeated(monkeypatch):
    outcomes = {"a": Outcome()}
    times = iter(np.arange(0, 1000, 1e-3))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(times))
    # The clock moves 1 ms a look: a call seems to take that, and a sample of five 1 / 5 ms each.
    count = timing._sample({"a": lambda: ((), ())}, outcomes, plan(rounds=2))
    assert count == {"a": 5}
    assert outcomes["a"].seconds == pytest.approx([2e-4] * 2)
