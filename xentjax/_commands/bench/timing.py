"""How `python -m xentjax bench` measures one case: everyone in turn, on the same arrays."""

import dataclasses
import functools
import importlib
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import xentjax
from xentjax._commands.bench import cases
from xentjax._commands.bench.cases import Case, Plan
from xentjax._commands.bench.contenders import Foreign

FEWEST = 3  # Samples, however long all of them take.
LONG = 30.0  # Seconds: a call that is longer is the only sample.
# PyTorch's threads go on spinning for a while when they have nothing to do, JAX's for less.
REST = 2e-3
REFERENCE = "optax"
OUT_OF_MEMORY = "out of memory"
TAKE_TENSORS = ("torch", "torch fused")
TOLERANCE = 1e-4  # The largest relative difference from the reference, in float32.

Call = Callable[[], tuple[Any, Sequence[Any]]]
"""Returns (value, gradients) once they are there."""


@dataclasses.dataclass
class Outcome:
    """The measurements of one contender, or of one limit.

    Attributes:
      problem: Why the rest is missing, where it is.
      seconds: Each sample, of one call.
      trace_seconds: Each time of tracing and lowering, which JAX does in Python.
      compile_seconds: Each time of compiling, which XLA does after that.
      temporaries: Bytes that it needs beside its arguments and results.
      flops: XLA's estimate, which counts the body of a loop once.
      value: The mean loss.
      value_difference: From the reference, relative to it.
      gradient_difference: The largest, relative to the largest entry.
    """

    problem: str | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    trace_seconds: list[float] = dataclasses.field(default_factory=list)
    compile_seconds: list[float] = dataclasses.field(default_factory=list)
    temporaries: int | None = None
    flops: float | None = None
    value: float | None = None
    value_difference: float | None = None
    gradient_difference: float | None = None

    def quartiles(self) -> tuple[float, float, float]:
        """Returns the lower quartile of the seconds, their median and the upper quartile."""
        low, median, high = np.percentile(self.seconds, [25, 50, 75])
        return float(low), float(median), float(high)

    def median(self) -> float:
        """Returns the median of the seconds; NaN where there are none."""
        return self.quartiles()[1] if self.seconds else math.nan

    def compile_median(self) -> float:
        """Returns the median of the seconds to trace and compile; NaN where there are none."""
        both = np.add(self.trace_seconds, self.compile_seconds)
        return float(np.median(both)) if len(both) else math.nan

    def is_wrong(self, dtype: str) -> bool:
        """Returns whether the value or the gradient is not that of the reference.

        A gradient in bfloat16 is rounded to it, by the reference too.
        """
        rounding = max(TOLERANCE, float(jnp.finfo(dtype).eps))
        differences = (self.value_difference, TOLERANCE), (self.gradient_difference, rounding)
        return any(x is not None and not x <= tolerance for x, tolerance in differences)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A case, the Outcome of everyone by name, and how many calls make one sample."""

    case: Case
    outcomes: dict[str, Outcome]
    calls: dict[str, int]


def measure(case: Case, plan: Plan) -> Measurement:
    """Compiles everyone, compares their answers, and takes samples in turn."""
    contenders, limits = cases.contenders(case, plan), cases.limits(case, plan)
    outcomes = {name: Outcome() for name in (*contenders, *limits)}
    primals, targets = cases.inputs(case)
    calls, functions = {}, {}
    for name, contender in contenders.items():
        if isinstance(contender, Foreign):
            package = contender.load()
            outcomes[name].problem = _why_not(name, package)
            if package is None or outcomes[name].problem is not None:
                continue
            function = functools.partial(contender.function, package)
        else:
            function = contender
        if name in TAKE_TENSORS:
            calls[name] = _torch_call(function, primals, targets, case.output)
            continue
        function = _with_output(function, len(primals), case.output)
        if case.is_eager:
            calls[name] = functools.partial(_ready, function, (*primals, *targets))
        else:
            functions[name] = function
    for name, limit in limits.items():
        functions[name] = functools.partial(_limit, limit, len(primals))
    calls |= _compiled(functions, (*primals, *targets), outcomes, plan.compilations)
    calls = _warm(calls, outcomes, contenders)
    return Measurement(case, outcomes, _sample(calls, outcomes, plan))


def _why_not(name, package):
    """Returns why a package does not contend; None if it does."""
    if package is None:
        return "not installed"
    if name in TAKE_TENSORS and jax.default_backend() != "cpu" and not package.cuda.is_available():
        return "not on this device"
    return None


def _with_output(contender, num_primals, output):
    """Returns the function (value, gradients) of JAX's arrays."""
    if output == "value":
        return lambda *arguments: (contender(*arguments), ())
    return jax.value_and_grad(contender, argnums=tuple(range(num_primals)))


def _limit(function, num_primals, *arguments):
    """Calls a limit, which takes the primals alone and has no gradients."""
    return function(*arguments[:num_primals]), ()


def _ready(function, arguments):
    return jax.block_until_ready(function(*arguments))


def _compiled(functions, arguments, outcomes, repeats):
    """Compiles everyone in turn from nothing, `repeats` times; returns a Call for each."""
    calls = {}
    for _ in range(repeats):
        for name, function in functions.items():
            jax.clear_caches()  # Nobody reuses the work of the one before.
            start = time.perf_counter()
            lowered = jax.jit(function).lower(*arguments)
            outcomes[name].trace_seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
            compiled = lowered.compile()
            outcomes[name].compile_seconds.append(time.perf_counter() - start)
            calls[name] = functools.partial(_ready, compiled, arguments)
            memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
            outcomes[name].temporaries = None if memory is None else memory.temp_size_in_bytes
            outcomes[name].flops = None if cost is None else cost.get("flops")
    return calls


def _torch_call(contender, primals, targets, output):
    """Returns the Call of a contender on tensors; labels alone are copied, to be int64."""
    torch = importlib.import_module("torch")
    leaves = [torch.from_dlpack(x).requires_grad_(output == "gradient") for x in primals]
    others = [torch.from_dlpack(x) for x in targets]
    others = [x.long() if x.dtype == torch.int32 else x for x in others]

    def call():
        value = contender(*leaves, *others)
        gradients = torch.autograd.grad(value, leaves) if output == "gradient" else ()
        if value.is_cuda:
            torch.cuda.synchronize()
        return value.detach(), gradients

    return call


def _warm(calls, outcomes, contenders):
    """Runs each once; returns those that had memory for it, contenders' answers compared."""
    reference, warm = None, {}
    for name in sorted(calls, key=lambda name: name != REFERENCE):
        try:
            value, gradients = calls[name]()
        except RuntimeError as error:  # JAX's and PyTorch's have no other type in common.
            if "memory" not in str(error).lower():
                raise
            outcomes[name].problem = OUT_OF_MEMORY
            continue
        warm[name] = calls[name]
        if name not in contenders:
            continue
        answer = [_as_jax(x) for x in (value, *gradients)]
        outcomes[name].value = float(jnp.mean(answer[0]))
        if name == REFERENCE:
            reference = answer
        elif reference is not None:
            of_value, *of_gradients = map(_difference, answer, reference)
            outcomes[name].value_difference = of_value
            outcomes[name].gradient_difference = max(of_gradients, default=None)
    return {name: warm[name] for name in calls if name in warm}


def _as_jax(x):
    """Returns an array, or a tensor's memory as one."""
    return x if isinstance(x, jax.Array) else jnp.from_dlpack(x.contiguous())


def _difference(x, y):
    """Returns the largest difference, relative to the largest entry of y."""
    return float(_largest_difference(x, y))


@jax.jit
def _largest_difference(x, y):
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y))


def _sample(calls, outcomes, plan):
    """Adds samples to the outcomes, everyone's in turn; returns how many calls make one."""
    seconds = {name: _seconds(call, 1) for name, call in calls.items()}
    count = {name: math.ceil(plan.sample / each) for name, each in seconds.items()}
    long = [name for name in calls if seconds[name] > LONG]
    for name in long:
        outcomes[name].seconds.append(seconds[name])
    calls = {name: call for name, call in calls.items() if name not in long}
    start = time.perf_counter()
    for i in range(plan.rounds):
        if i >= FEWEST and time.perf_counter() - start > plan.patience:
            break
        for name in calls if i % 2 else reversed(calls):
            time.sleep(REST)
            outcomes[name].seconds.append(_seconds(calls[name], count[name]))
    return count


def _seconds(call, count):
    """Returns the seconds of one call; no result outlives the next call, or the last one."""
    results = []
    start = time.perf_counter()
    for _ in range(count):
        results.clear()
        results.append(call())
    return (time.perf_counter() - start) / count


def import_seconds(repeats: int) -> dict[str, list[float]]:
    """Returns the seconds to import JAX alone, and with xentjax, in processes of their own."""
    seconds = {"jax": [], "jax, xentjax": []}
    for _ in range(repeats):
        for names, samples in seconds.items():
            program = (
                "import time; start = time.perf_counter(); "
                f"import {names}; print(time.perf_counter() - start)"
            )
            process = subprocess.run(
                [sys.executable, "-c", program],
                cwd=Path(xentjax.__file__).parents[1],
                capture_output=True,
                text=True,
                check=True,
            )
            samples.append(float(process.stdout))
    return seconds
