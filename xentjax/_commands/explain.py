"""`python -m xentjax explain`: from the surprisal of each class to the gradient of the loss.

Plain text, and no package beyond those of the library.
"""

import argparse

import numpy as np

import xentjax

MAX_NAMES = 12  # More names are not listed in an error.
HINT = "(--normalize divides by their sum, --logits takes logits)"


def run(arguments: argparse.Namespace) -> int:
    """Prints the chain for the prediction in `arguments`; returns the exit code."""
    print(_explanation(arguments))
    return 0


def _explanation(arguments: argparse.Namespace) -> xentjax.Explanation:
    """Returns the answer to the question that the arguments ask; raises ArgumentError."""
    numbers = _read_numbers(arguments.numbers)
    classes = _read_classes(arguments.classes, len(numbers))
    targets = _read_label(arguments.label, classes)
    if arguments.smoothing > 0:
        targets = xentjax.smooth_labels(targets, arguments.smoothing)
    try:
        return xentjax.explain(
            numbers,
            targets,
            given=arguments.kind,
            base=2 if arguments.bits else None,
            classes=classes,
        )
    except ValueError as error:
        hint = f" {HINT}" if arguments.kind == "probabilities" else ""
        _, _, message = str(error).partition("prediction: ")
        raise argparse.ArgumentError(None, f"argument NUMBERS: {message}{hint}") from None


def _read_numbers(given: str) -> np.ndarray:
    try:
        return np.array([float(word) for word in given.split(",")])
    except ValueError:
        raise _error("NUMBERS", "numbers with commas between them", given) from None


def _read_classes(given: str | None, count: int) -> list[str]:
    if given is None:
        return [str(v) for v in range(count)]
    classes = [name.strip() for name in given.split(",")]
    if len(classes) != count or len(set(classes)) != count or not all(classes):
        raise _error("--classes", f"{count} different names, one for each of NUMBERS", given)
    return classes


def _read_label(given: str, classes: list[str]) -> int:
    """Returns an index. A name comes first: with --classes 1,2,3 the label 1 has index 0."""
    label = given.strip()
    if label in classes:
        return classes.index(label)
    if label.isdecimal() and int(label) < len(classes):
        return int(label)
    names = ", ".join(classes) if len(classes) <= MAX_NAMES else f"{classes[0]} … {classes[-1]}"
    raise _error("--label", f"a name or an index of the {len(classes)} classes {names}", label)


def _error(argument: str, expected: str, given: str) -> argparse.ArgumentError:
    message = f"argument {argument}: expected {expected}, got {given.strip()}"
    return argparse.ArgumentError(None, message)
