"""`python -m xentjax bench`: time and memory of each loss, beside other libraries' for the same.

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

import xentjax
from xentjax._commands.bench import cases, head_plans, report, speed_map, timing
from xentjax._commands.bench.cases import Case, Plan
from xentjax._commands.bench.contenders import CONTENDERS
from xentjax._commands.bench.timing import REFERENCE, TOLERANCE, Measurement, Outcome
from xentjax._commands.common import check_writable, fail, progress_bar
from xentjax._explain.text import paragraph

PACKAGES = ("jax", "jaxlib", "numpy", "optax", "torch", "tokamax")


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints the tables, saves record and picture; returns the exit code.

    With --head-plan it prints plans alone.
    """
    if arguments.head_plan is not None:
        print("\n".join(head_plans.tables(arguments.head_plan)))
        return 0
    start = time.perf_counter()
    plan = cases.PLANS[arguments.plan]
    if arguments.rounds is not None:
        plan = dataclasses.replace(plan, rounds=arguments.rounds)
    chosen, with_imports = choose(arguments.cases, plan)
    has_picture = any(case.size == "scaling" for case in chosen)
    if arguments.json is not None:
        check_writable("--json", arguments.json)
    if has_picture:
        check_writable("--output", arguments.output)
    record = setting(plan, arguments.plan)
    print("\n".join(summary(record)))
    measurements = []
    with progress_bar() as progress:
        bar = progress.add_task("", total=len(chosen) + with_imports)
        for case in chosen:
            progress.update(bar, description=f"{case.loss} {case.size} {case.output}")
            measurements.append(timing.measure(case, plan))
            progress.advance(bar)
        if with_imports:
            progress.update(bar, description="import")
            record["import_seconds"] = timing.import_seconds(plan.imports)
            progress.advance(bar)
    torch = sys.modules.get("torch")
    record["torch_threads"] = None if torch is None else torch.get_num_threads()
    record["cases"] = [as_json(measurement) for measurement in measurements]
    if arguments.plan == "map":
        record["map"] = speed_map.summary(measurements)
        lines = speed_map.tables(measurements)
    else:
        lines = itertools.chain(report.tables(measurements), remarks(measurements, record))
    print("\n".join([*lines, *wrong_answers(measurements), ""]))
    if arguments.json is not None:
        try:
            arguments.json.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        except OSError as error:
            return fail(f"argument --json: {error}")
        print(f"Record: {arguments.json}")
    if has_picture:
        try:
            picture = report.picture(measurements, plan, place(record))
            picture.savefig(arguments.output, dpi=150)
        except OSError as error:
            return fail(f"argument --output: {error}")
        print(f"Picture: {arguments.output}")
    print(f"({time.perf_counter() - start:.0f} s in all)")
    return check(measurements)


def choose(given: Collection[str], plan: Plan) -> tuple[list[Case], bool]:
    """Returns the cases to measure, and whether to measure imports; raises ArgumentError."""
    known = list(itertools.chain(*cases.words(plan)))
    unknown = [word for word in given if word not in known]
    if unknown:
        expected = f"expected words of {', '.join(known)}, with commas between them"
        raise argparse.ArgumentError(None, f"argument --cases: {expected}, got {unknown[0]!r}")
    found = cases.all_cases(plan, jax.default_backend())
    found = cases.chosen(found, plan, given)
    with_imports = plan.imports > 0 and (not given or "import" in given)
    if not found and not with_imports:
        message = f"expected words that a case has together, got {','.join(given)}"
        raise argparse.ArgumentError(None, f"argument --cases: {message}")
    return found, with_imports


def setting(plan: Plan, name: str) -> dict[str, Any]:
    """Returns the machine, the versions and the plan, on which the numbers depend."""
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
        "plan": name,
        "rounds": plan.rounds,
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


def summary(record: dict[str, Any]) -> list[str]:
    """Returns machine and versions as lines to read."""
    machine, device, versions = record["machine"], record["device"], record["versions"]
    memory = machine["memory_bytes"]
    names = [f"{name} {number}" for name, number in versions.items() if number is not None]
    hardware = (
        f"{machine['cpu']}, {machine['cores']} cores"
        + ("" if memory is None else f", {memory / 2**30:.0f} GiB")
        + f"; JAX on {device['platform']}: {device['count']} × {device['kind']}"
    )
    return [*paragraph(hardware), *paragraph(", ".join(names)), record["date"]]


def place(record: dict[str, Any]) -> str:
    """Returns the device and the version of JAX, for a title."""
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
    return {
        "loss": case.loss,
        "size": case.size,
        **case.shape._asdict(),
        "dtype": case.dtype,
        "output": case.output,
        "logits": case.logits,
        "logits_bytes": case.logits_bytes,
        "contenders": {name: x for name, x in outcomes.items() if name in CONTENDERS[case.loss]},
        "limits": {name: x for name, x in outcomes.items() if name not in CONTENDERS[case.loss]},
    }


def outcome_as_json(outcome: Outcome) -> dict[str, Any]:
    """Returns an outcome with its statistics; a quantity that was not measured is null."""
    fields = dataclasses.asdict(outcome)
    samples = fields.pop("seconds")
    names = "lower_quartile", "median", "upper_quartile"
    quartiles = outcome.quartiles() if samples else (None,) * 3
    return {
        "seconds": dict(zip(names, quartiles, strict=True)) | {"samples": samples},
        **{name: number(value) for name, value in fields.items()},
    }


def number(value: Any) -> Any:
    """Returns a value that JSON has: a number that is not finite as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def remarks(measurements: Sequence[Measurement], record: dict[str, Any]) -> Iterator[str]:
    """Yields lines: the time of imports, and the cases in which xentjax takes longer."""
    if "import_seconds" in record:
        alone, both = (np.median(samples) for samples in record["import_seconds"].values())
        yield f"\nimport jax: {alone:.2f} s; import jax, xentjax: {both:.2f} s"
    optax = "xentjax takes longer than optax"
    slower = report.slower(measurements)
    if measurements:
        yield f"\n{optax} in none of these." if not slower else f"\n{optax} in:"
    for line in slower:
        yield from paragraph(f"  {line}", "    ")


def wrong_answers(measurements: Sequence[Measurement]) -> Iterator[str]:
    """Yields a line for each answer that differs from the reference's."""
    for m in measurements:
        for name, outcome in m.outcomes.items():
            if outcome.is_wrong(m.case.dtype):
                yield from ("", *paragraph(f"{report.describe(m)}: {wrong(name, outcome)}"))


def wrong(name: str, outcome: Outcome) -> str:
    """Returns how far an answer is from the reference's."""
    parts = {"loss": outcome.value_difference, "gradient": outcome.gradient_difference}
    return f"{name} is off {REFERENCE}'s " + ", its ".join(
        f"{part} by {x:.1e} of that" for part, x in parts.items() if x is not None
    )


def check(measurements: Sequence[Measurement]) -> int:
    """Returns the exit code: a failure where xentjax's answer differs from the reference's.

    A difference of another library is shown, and is its own affair.
    """
    for m in measurements:
        if m.outcomes["xentjax"].is_wrong(m.case.dtype):
            return fail(
                f"{report.describe(m)}: {wrong('xentjax', m.outcomes['xentjax'])}; "
                f"expected at most {TOLERANCE:g}, or a rounding of the gradient"
            )
    return 0
