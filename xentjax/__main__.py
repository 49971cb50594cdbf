"""The command line: `python -m xentjax COMMAND`.

A command is a parser made in `_parser`, under the name a user types, and `run(arguments)` in the
module of that name in `_commands`. The module is imported when its command is called,
so that no command needs a package that only another one uses.
"""

import argparse
import importlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import xentjax
from xentjax._process import end_quietly


class _Parser(argparse.ArgumentParser):
    """Raises the fault of the arguments, for `main` to print in one line."""

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: The words after `python -m xentjax`; None takes those of the process.

    Returns:
      The exit code: 0, 1 where the command failed, 2 where the arguments are wrong. Without a
      command the help is printed, as by pip, and the exit code is 0.
    """
    words = sys.argv[1:] if argv is None else argv
    if not words:
        _parser().print_help()
        return 0
    try:
        # To argparse "-1,2" looks like an option, " -1,2" does not.
        arguments = _parser().parse_args([re.sub(r"^-(?=\.?\d|inf\b)", " -", w) for w in words])
        run = _load(arguments.command)
        return 1 if run is None else run(arguments)
    except argparse.ArgumentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _load(command: str) -> Callable[[argparse.Namespace], int] | None:
    """Returns the `run` of a command; prints an error and returns None if a package is missing."""
    try:
        return importlib.import_module(f"xentjax._commands.{command}").run
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "xentjax":
            raise
        needs = f'{command} needs {package}, which is not installed: pip install "xentjax[demo]"'
        print(f"error: {needs}", file=sys.stderr)
        return None


def _parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    summary = (xentjax.__doc__ or "").partition("\n")[0]
    parser = _Parser(prog="python -m xentjax", description=summary, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"xentjax {xentjax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(command: str, summary: str) -> argparse.ArgumentParser:
        return commands.add_parser(command, help=summary, description=summary, allow_abbrev=False)

    _add_demo_options(
        add("demo", "Train on handwritten digits with hard labels, smoothed labels and mixup.")
    )
    _add_lm_options(
        add("lm", "Train a language model twice, with its logits in memory and without them.")
    )
    _add_explain_options(
        add(
            "explain",
            "Show how the loss of one prediction comes about, from surprisal to gradient.",
        )
    )
    _add_bench_options(
        add("bench", "Measure time and memory of each loss, beside other libraries' and limits.")
    )
    return parser


def _add_demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--epochs", type=_number(int, 1, 10_000), default=40, help="passes over the data (40)"
    )
    _add_seed(parser)
    _add_output(parser, "xentjax-demo.png")


def _add_lm_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps", type=_number(int, 1, 100_000), default=50, help="steps of the training (50)"
    )
    parser.add_argument(
        "--vocabulary",
        type=_number(int, 2, 1_000_000),
        default=30_000,
        help="the most words of the vocabulary (30000)",
    )
    parser.add_argument(
        "--batch",
        type=_number(int, 16, 1_000_000),
        default=1024,
        help="words that a step predicts (1024)",
    )
    parser.add_argument(
        "--budget",
        type=_number(int, 0, 1_000_000),
        default=64,
        help="MiB of temporaries for the loss without logits (64)",
    )
    _add_seed(parser)
    _add_output(parser, "xentjax-lm.png")


def _add_explain_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Example: python -m xentjax explain 0.1,0.2,0.7 --label dog --classes panda,bird,dog"
    )
    parser.add_argument("numbers", metavar="NUMBERS", help="one for each class, as in 0.1,0.2,0.7")
    parser.add_argument(
        "--label", required=True, help="the class that is true: its name, or its index from 0"
    )
    parser.add_argument("--classes", help="the names of the classes, as in panda,bird,dog (0,1,2)")
    parser.set_defaults(kind="probabilities")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--logits",
        action="store_const",
        dest="kind",
        const="logits",
        help="NUMBERS are logits, and not probabilities",
    )
    kinds.add_argument(
        "--normalize",
        action="store_const",
        dest="kind",
        const="weights",
        help="divide NUMBERS by their sum to get probabilities",
    )
    parser.add_argument("--bits", action="store_true", help="count in bits, and not in nats")
    parser.add_argument(
        "--smoothing",
        type=_number(float, 0, 1),
        default=0.0,
        metavar="EPS",
        help="the share of the truth that is spread over all classes (0)",
    )


def _add_bench_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Example: python -m xentjax bench --cases labels,smoothing,language,gradient. WORDS name "
        "losses, sizes, dtypes, kinds of logits, and value or gradient. A case is measured if it "
        "has one of the given words of each kind; a kind without a given word allows every case."
    )
    parser.set_defaults(plan="full")
    plans = parser.add_mutually_exclusive_group()
    plans.add_argument(
        "--quick",
        action="store_const",
        dest="plan",
        const="quick",
        help="smaller and fewer cases, in one to three minutes",
    )
    plans.add_argument(
        "--map",
        action="store_const",
        dest="plan",
        const="map",
        help="xentjax beside optax alone, at many sizes: speed and compile time of each case",
    )
    plans.add_argument(
        "--head-plan",
        nargs="?",
        const=(),
        type=_head,
        metavar="NxDxV",
        help="how a head of N tokens, D features and V classes is cut up, and its predicted cost; "
        "without NxDxV, every head of the benchmark; nothing is measured",
    )
    parser.add_argument(
        "--cases",
        type=lambda text: tuple(text.strip().split(",")),
        default=(),
        metavar="WORDS",
        help="the cases to measure, in words with commas between them (all cases)",
    )
    parser.add_argument(
        "--rounds",
        type=_number(int, 1, 10_000),
        help="samples of each; fewer where a case takes long (10; with --map 51)",
    )
    parser.add_argument("--json", type=_file, metavar="FILE", help="a record of every number")
    _add_output(parser, "xentjax-bench.png")


def _add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed",
        type=_number(int, 0, 2**32 - 1),
        default=0,
        help="the seed of all random numbers (0)",
    )


def _add_output(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--output", type=_picture, default=default, help=f"the picture ({default})")


def _number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """Returns a reader of a number in [low, high]."""

    def read(text: str) -> float:
        expected = f"expected {'a whole' if kind is int else 'a'} number from {low} to {high}"
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{expected}, got {text.strip()!r}")
        return value

    return read


def _head(text: str) -> tuple[tuple[int, ...]]:
    """Reads the sizes of a head."""
    found = re.fullmatch("x".join([r"([1-9]\d{0,8})"] * 3), text, re.ASCII)
    if found is None:
        expected = "expected tokens x features x classes, as in 2048x768x50257"
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")
    return (tuple(map(int, found.groups())),)


def _picture(text: str) -> Path:
    """Reads the name of a picture."""
    path = Path(text)
    if path.suffix.lower() not in {".png", ".pdf", ".svg"}:
        raise argparse.ArgumentTypeError(f"expected a name in .png, .pdf or .svg, got {text!r}")
    return _file(text)


def _file(text: str) -> Path:
    """Reads the name of a file; a command asks before its work whether it can be written."""
    path = Path(text)
    # The methods of Path raise where a name is too long.
    if os.path.isdir(path) or not os.path.isdir(path.parent):
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, got {text!r}")
    return path


if __name__ == "__main__":
    end_quietly()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal without Σ shows "?" in its place. Whole lines are out before a Ctrl-C.
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    sys.exit(main())
