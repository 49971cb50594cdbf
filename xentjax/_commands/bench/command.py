"""`python -m xentjax bench`: what each loss takes, beside what others take for the same.

Everyone gets the same arrays and takes turns. The answers are compared too: how fast a wrong one is
made is of no interest.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

import xentjax
from xentjax._commands.bench import cases as _bench_cases
from xentjax._commands.bench import report as _bench_report
from xentjax._commands.bench import timing as _bench_timing
from xentjax._commands.bench.cases import Case, Plan
from xentjax._commands.bench.timing import REFERENCE, TOLERANCE, Measurement, Outcome
from xentjax._commands.common import fail

PACKAGES = ("jax", "jaxlib", "numpy", "optax", "torch", "tokamax")


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints the tables, saves record and picture; returns the exit code."""
    console = Console()
    start = time.perf_counter()
    plan = _bench_cases.QUICK if arguments.quick else _bench_cases.FULL
    cases, with_imports = choose(arguments.cases, plan)
    record = setting(plan, arguments)
    console.print(summary(record), highlight=False)
    measurements = []
    with Progress(console=console) as progress:
        bar = progress.add_task("", total=len(cases) + with_imports)
        for case in cases:
            progress.update(bar, description=f"{case.loss} {case.size} {case.output}")
            measurements.append(_bench_timing.measure(case, arguments.rounds, plan))
            progress.advance(bar)
        if with_imports:
            progress.update(bar, description="import")
            record["import_seconds"] = _bench_timing.import_seconds(plan.repeats)
            progress.advance(bar)
    torch = sys.modules.get("torch")
    record["torch_threads"] = None if torch is None else torch.get_num_threads()
    record["cases"] = [as_json(measurement) for measurement in measurements]
    _bench_report.tables(console, measurements)
    console.print("\n".join(remarks(measurements, record)), highlight=False)
    try:
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
            print(f"Record: {arguments.json}")
    except OSError as error:
        return fail(f"argument --json: {error}")
    try:
        if any(case.size == "scaling" for case in cases):
            picture = _bench_report.picture(measurements, plan, place(record))
            picture.savefig(arguments.output, dpi=150)
            print(f"Picture: {arguments.output}")
    except OSError as error:
        return fail(f"argument --output: {error}")
    print(f"({time.perf_counter() - start:.0f} s in all)")
    return check(measurements)


def choose(given: Collection[str], plan: Plan) -> tuple[list[Case], bool]:
    """Returns the cases to measure, and whether to measure imports; raises ArgumentError."""
    known = list(itertools.chain(*_bench_cases.words(plan)))
    unknown = [word for word in given if word not in known]
    if unknown:
        expected = f"expected words of {', '.join(known)}, with commas between them"
        raise argparse.ArgumentError(None, f"argument --cases: {expected}, got {unknown[0]!r}")
    cases = _bench_cases.cases(plan, jax.default_backend())
    cases = _bench_cases.chosen(cases, plan, given)
    with_imports = not given or "import" in given
    if not cases and not with_imports:
        message = f"expected words that a case has together, got {','.join(given)}"
        raise argparse.ArgumentError(None, f"argument --cases: {message}")
    return cases, with_imports


def setting(plan: Plan, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what the numbers depend on: machine, versions, and how they are taken."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "memory_bytes": memory_bytes(),
            "system": platform.platform(),
        },
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
        },
        "versions": {
            "xentjax": xentjax.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
        "xla_flags": os.environ.get("XLA_FLAGS"),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES"),
        "plan": "quick" if arguments.quick else "full",
        "rounds": arguments.rounds,
        "patience_seconds": plan.patience,
    }


def version(package: str) -> str | None:
    """Returns the version of a package that is installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """Returns the name of the processor, as Linux or else as Python knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """Returns the size of the machine's memory, where the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def summary(record: dict[str, Any]) -> str:
    """Returns machine and versions, as one reads them."""
    machine, device, versions = record["machine"], record["device"], record["versions"]
    memory = machine["memory_bytes"]
    names = [f"{name} {number}" for name, number in versions.items() if number is not None]
    return (
        f"{machine['cpu']}, {machine['cores']} cores"
        + ("" if memory is None else f", {memory / 2**30:.0f} GiB")
        + f"; JAX on {device['platform']}: {device['count']} × {device['kind']}\n"
        + f"{', '.join(names)}\n{record['date']}"
    )


def place(record: dict[str, Any]) -> str:
    """Returns the device and what runs on it, for a title."""
    device = record["device"]
    name = record["machine"]["cpu"] if device["platform"] == "cpu" else device["kind"]
    return f"{name}, jax {record['versions']['jax']}"


def as_json(measurement: Measurement) -> dict[str, Any]:
    """Returns a measurement as it is recorded."""
    case = measurement.case
    outcomes = {
        name: outcome_as_json(outcome) | {"calls_per_sample": measurement.calls.get(name)}
        for name, outcome in measurement.outcomes.items()
    }
    limits = _bench_cases.limits(case)
    return {
        "loss": case.loss,
        "size": case.size,
        **case.shape._asdict(),
        "dtype": case.dtype,
        "output": case.output,
        "logits_bytes": case.logits_bytes,
        "contenders": {name: x for name, x in outcomes.items() if name not in limits},
        "limits": {name: outcomes[name] for name in limits},
    }


def outcome_as_json(outcome: Outcome) -> dict[str, Any]:
    """Returns an outcome with its statistics; what was not measured is null."""
    fields = dataclasses.asdict(outcome)
    samples = fields.pop("seconds")
    names = "lower_quartile", "median", "upper_quartile"
    quartiles = outcome.quartiles() if samples else (None,) * 3
    return {
        "seconds": dict(zip(names, quartiles, strict=True)) | {"samples": samples},
        **{name: number(value) for name, value in fields.items()},
    }


def number(value: Any) -> Any:
    """Returns a value that JSON has: what is not finite as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def remarks(measurements: Sequence[Measurement], record: dict[str, Any]) -> Iterator[str]:
    """Yields what the tables do not say."""
    if "import_seconds" in record:
        alone, both = (np.median(samples) for samples in record["import_seconds"].values())
        yield f"\nimport jax: {alone:.2f} s; import jax, xentjax: {both:.2f} s"
    optax = "xentjax takes longer than optax"
    slower = _bench_report.slower(measurements)
    if measurements:
        yield f"\n{optax} in none of these." if not slower else f"\n{optax} in:"
    yield from (f"  {line}" for line in slower)
    for m in measurements:
        for name, outcome in m.outcomes.items():
            if outcome.is_wrong(m.case.dtype):
                yield f"\n{_bench_report.describe(m)}: {wrong(name, outcome)}"


def wrong(name: str, outcome: Outcome) -> str:
    """Returns how far an answer is from the reference's."""
    parts = {"loss": outcome.value_difference, "gradient": outcome.gradient_difference}
    return f"{name} is off {REFERENCE}'s " + ", its ".join(
        f"{part} by {x:.1e} of that" for part, x in parts.items() if x is not None
    )


def check(measurements: Sequence[Measurement]) -> int:
    """Returns the exit code: a failure where xentjax does not answer what the reference does.

    What another library answers is shown, and is its own affair.
    """
    for m in measurements:
        if m.outcomes["xentjax"].is_wrong(m.case.dtype):
            return fail(
                f"{_bench_report.describe(m)}: {wrong('xentjax', m.outcomes['xentjax'])}; "
                f"expected at most {TOLERANCE:g}, or a rounding of the gradient"
            )
    return 0
