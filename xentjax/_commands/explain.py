"""`python -m xentjax explain`: from the surprisal of each class to the gradient of the loss.

Plain text, and no package beyond those of the library.
"""

import argparse
import dataclasses
import unicodedata
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import xentjax

_LARGEST = 1e38  # Any two such logits have a difference that float32 holds.
_FEW = 4  # At most so many terms of a sum are written out,
_MANY = 12  # and so many names listed.


@dataclasses.dataclass(frozen=True)
class Question:
    """A prediction and its truth, as given.

    Attributes:
      logits: float64[V], finite or −inf; log p where probabilities are given.
      is_logits: Whether logits are given.
      classes: V names.
      label: The class that is true.
      smoothing: The share of the truth that is spread over all classes.
      bits: Whether to count in bits.
    """

    logits: np.ndarray
    is_logits: bool
    classes: list[str]
    label: int
    smoothing: float
    bits: bool

    @property
    def base(self) -> int | None:
        """The base of the logarithms, None for e."""
        return 2 if self.bits else None

    @property
    def unit(self) -> str:
        """The unit of information."""
        return "bits" if self.bits else "nats"


@dataclasses.dataclass(frozen=True)
class Chain:
    """What follows from a question, in its unit; the arrays are float[V]."""

    probabilities: np.ndarray
    surprisals: np.ndarray
    truth: np.ndarray
    entropy: float
    cross_entropy: float
    loss: float
    perplexity: float
    gradient: np.ndarray


def run(arguments: argparse.Namespace) -> int:
    """Prints the chain for the prediction in `arguments`; returns the exit code."""
    question = _read(arguments)
    print("\n".join(_lines(question, follow(question))))
    return 0


def follow(question: Question) -> Chain:
    """Returns every link of the chain."""
    # softmax does not feel a shift; without it float32 could lose what sets large logits apart.
    logits = jnp.asarray(question.logits - question.logits.max(), jnp.float32)
    targets = jnp.asarray(question.label)
    if question.smoothing > 0:
        targets = xentjax.smooth_labels(targets, question.smoothing)
    truth = xentjax.dense_targets(targets, len(question.classes))
    nats = np.log(2) if question.bits else 1.0

    def loss(logits):
        return xentjax.softmax_cross_entropy(logits, targets) / nats

    value, gradient = jax.value_and_grad(loss)(logits)
    surprisals = xentjax.softmax_surprisal(logits)
    return Chain(
        probabilities=np.exp(-np.asarray(surprisals, np.float64)),
        surprisals=np.asarray(xentjax.softmax_surprisal(logits, base=question.base)),
        truth=np.asarray(truth),
        entropy=float(xentjax.softmax_entropy(logits, base=question.base)),
        cross_entropy=float(xentjax.softmax_cross_entropy(logits, truth) / nats),
        loss=float(value),
        perplexity=float(xentjax.perplexity(xentjax.softmax_cross_entropy(logits, targets))),
        gradient=np.asarray(gradient),
    )


def _read(arguments: argparse.Namespace) -> Question:
    """Returns the question that the arguments ask; raises ArgumentError."""
    numbers = _read_numbers(arguments.numbers)
    classes = _read_classes(arguments.classes, len(numbers))
    (_check_logits if arguments.logits else _check_probabilities)(numbers, arguments.numbers)
    with np.errstate(divide="ignore"):  # log 0 = −inf: that class has probability 0.
        logits = numbers if arguments.logits else np.log(numbers)
    return Question(
        logits=logits,
        is_logits=arguments.logits,
        classes=classes,
        label=_read_label(arguments.label, classes),
        smoothing=arguments.smoothing,
        bits=arguments.bits,
    )


def _read_numbers(text: str) -> np.ndarray:
    try:
        return np.array([float(word) for word in text.split(",")])
    except ValueError:
        raise _error("NUMBERS", "numbers with commas between them", text) from None


def _check_logits(logits: np.ndarray, text: str) -> None:
    masked = np.isneginf(logits)
    if not np.all(masked | (np.abs(logits) <= _LARGEST)):
        raise _error("NUMBERS", f"logits from −{_LARGEST:g} to {_LARGEST:g}, or −inf", text)
    if masked.all():
        raise _error("NUMBERS", "at least one logit above −inf", text)


def _check_probabilities(p: np.ndarray, text: str) -> None:
    expected = "probabilities of at least 0 that sum to 1 (for logits, add --logits)"
    if not np.all(p >= 0):
        raise _error("NUMBERS", expected, text)
    if not round(abs(p.sum() - 1), 9) <= 1e-6:  # Rounded: 1 − 0.999999 is a little over 1e-6.
        raise _error("NUMBERS", expected, f"{text}, which sum to {p.sum():.8g}")


def _read_classes(text: str | None, count: int) -> list[str]:
    if text is None:
        return [str(v) for v in range(count)]
    classes = [name.strip() for name in text.split(",")]
    if len(classes) != count or len(set(classes)) != count or not all(classes):
        raise _error("--classes", f"{count} different names, one for each of NUMBERS", text)
    return classes


def _read_label(text: str, classes: list[str]) -> int:
    """A name comes first: with --classes 1,2,3 the label 1 is the class at index 0."""
    label = text.strip()
    if label in classes:
        return classes.index(label)
    if label.isdecimal() and int(label) < len(classes):
        return int(label)
    names = ", ".join(classes) if len(classes) <= _MANY else f"{classes[0]} … {classes[-1]}"
    raise _error("--label", f"a name or an index of the {len(classes)} classes {names}", label)


def _error(argument: str, expected: str, given: str) -> argparse.ArgumentError:
    message = f"argument {argument}: expected {expected}, got {given.strip()}"
    return argparse.ArgumentError(None, message)


def _lines(question: Question, chain: Chain) -> list[str]:
    """Returns the whole answer."""
    true_class = question.classes[question.label]
    title = f"Classes: {len(question.classes)}. Truth: {true_class}. Unit: {question.unit}."
    return [title, "", *_table(_columns(question, chain)), "", *_links(question, chain)]


def _columns(question: Question, chain: Chain) -> list[list[str]]:
    """Returns the table of the classes, column by column: name, symbol, cells."""
    columns = [
        ["class", "v", *question.classes],
        ["probability", "p_v", *map(_text, chain.probabilities)],
        ["surprisal", "s_v", *map(_text, chain.surprisals)],
        ["truth", "t_v", *map(_text, chain.truth)],
        ["gradient", "g_v", *map(_text, chain.gradient)],
    ]
    if question.is_logits:
        columns.insert(1, ["logit", "z_v", *map(_text, question.logits)])
    return columns


def _table(columns: Sequence[Sequence[str]]) -> list[str]:
    """Returns the rows, with the first column to the left and the others to the right."""
    widths = [max(map(_width, column)) for column in columns]

    def row(cells: Sequence[str]) -> str:
        gaps = [" " * (width - _width(cell)) for cell, width in zip(cells, widths, strict=True)]
        padded = [cells[0] + gaps[0], *map(str.__add__, gaps[1:], cells[1:])]
        return "   ".join(padded).rstrip()

    return [row(cells) for cells in zip(*columns, strict=True)]


def _links(question: Question, chain: Chain) -> list[str]:
    """Returns the links in words: the name, the formula with its value, and what it means."""
    p, s, t, unit = chain.probabilities, chain.surprisals, chain.truth, question.unit
    truth, loss, error = _formulas(question)
    links = [
        (
            "surprisal",
            f"s_v = −{'log2' if question.bits else 'log'} p_v",
            "How surprising class v would be: the less likely, the more.",
        ),
        (
            "entropy",
            f"H(p) = Σ_v p_v · s_v = {_text(chain.entropy)} {unit}",
            *_written_out(p, s),
            "The mean surprisal that the prediction itself expects.",
        ),
        ("truth", truth, "What the prediction is held against."),
        (
            "cross-entropy",
            f"H(t, p) = Σ_v t_v · s_v = {_text(chain.cross_entropy)} {unit}",
            *_written_out(t, s),
            "The mean surprisal that the prediction meets where t is the truth.",
        ),
        (
            "loss",
            f"{loss} = {_text(chain.loss)} {unit}",
            f"lse(z) = log Σ_v exp(z_v){'' if question.is_logits else ', z = log p'}",
            "The same number from the logits, as training computes it."
            if np.isfinite(chain.loss)
            else "The prediction says 0 where the truth does not, and nothing costs more.",
        ),
        (
            "perplexity",
            f"{'2^loss' if question.bits else 'exp(loss)'} = {_perplexity_text(chain)}",
            "As surprised as by one of so many equally likely classes.",
        ),
        (
            "gradient",
            f"g_v = ∂loss/∂z_v = {error}",
            "A step against it moves p towards t, fastest where they differ most.",
        ),
    ]
    if question.is_logits:
        formula = "p_v = exp(z_v) / Σ_u exp(z_u)"
        links.insert(0, ("softmax", formula, "The logits as probabilities."))
    return _paragraphs(links)


def _formulas(question: Question) -> tuple[str, str, str]:
    """Returns the formulas of the truth, the loss and its gradient."""
    share, true_class = question.smoothing, question.classes[question.label]
    truth = f"t_v = 1 for {true_class}, 0 for others"
    loss, error = f"lse(z) − z_{true_class}", "p_v − t_v"
    if share > 0:
        spread = f"{share:g} / {len(question.classes)}"
        truth = f"t_v = (1 − {share:g}) · (1 for {true_class}, 0 for others) + {spread}"
        loss = "Σ_v t_v · (lse(z) − z_v)"
    if question.bits:
        loss, error = f"({loss}) / ln 2", f"({error}) / ln 2"
    return truth, loss, error


def _paragraphs(links: Sequence[tuple[str, ...]]) -> list[str]:
    """Returns (name, text, text, ...) as lines with the name before the first text."""
    lines = []
    for name, *texts in links:
        starts = [name, *[""] * (len(texts) - 1)]
        lines += [f"{start:<16}{text}" for start, text in zip(starts, texts, strict=True)]
    return lines


def _perplexity_text(chain: Chain) -> str:
    """Returns five digits: exp makes the absolute error of the loss a relative one."""
    if np.isfinite(chain.loss) and not np.isfinite(chain.perplexity):
        return "more than 3.4e+38"
    return f"{chain.perplexity:#.5g}"


def _written_out(shares: np.ndarray, values: np.ndarray) -> list[str]:
    """Returns [a·b + …] of the shares that are not 0; nothing where they are too many to read."""
    terms = [f"{_text(a)}·{_text(b)}" for a, b in zip(shares, values, strict=True) if a > 0]
    return ["= " + " + ".join(terms)] if len(terms) <= _FEW else []


def _text(x: float) -> str:
    """Returns x with four decimals, or four digits where those would not show it."""
    if x == 0 or not np.isfinite(x) or 1e-3 <= abs(x) < 1e5:
        return f"{x + 0.0:.4f}"  # + 0.0 takes the sign from −0.
    return f"{x:.3e}"


def _width(text: str) -> int:
    """Returns the columns of a terminal that `text` takes: 2 for wide signs, as 🐼."""
    return sum(1 + (unicodedata.east_asian_width(sign) in "WF") for sign in text)
