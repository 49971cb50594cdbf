"""`python -m xentjax explain`: from the surprisal of each class to the gradient of the loss.

Plain text, and no package beyond those of the library.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import xentjax
from xentjax._explain.text import definitions, paragraph, table

MAX_LOGIT = 1e38  # Any two such logits have a difference that float32 holds.
MAX_TERMS = 4  # A sum of more terms is not written out.
MAX_NAMES = 12  # More names are not listed in an error.


@dataclasses.dataclass(frozen=True)
class Question:
    """A prediction and its truth, as given.

    Attributes:
      numbers: float64[V], as given.
      kind: "logits", "probabilities", or "weights" to be divided by their sum.
      classes: V names.
      label: The class that is true.
      smoothing: The share of the truth that is spread over all classes.
      bits: Whether to count in bits.
    """

    numbers: np.ndarray
    kind: str
    classes: list[str]
    label: int
    smoothing: float
    bits: bool

    @property
    def logits(self) -> np.ndarray:
        """float64[V], finite or −inf; log p where probabilities are given."""
        if self.kind == "logits":
            return self.numbers
        with np.errstate(divide="ignore"):  # log 0 = −inf: that class has probability 0.
            return np.log(self.numbers)

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
    """The numbers that follow from a question, in its unit; the arrays are float[V]."""

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
    print("\n".join(answer(question, follow(question))))
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
    kind = arguments.kind
    checks = {
        "logits": _check_logits,
        "probabilities": _check_probabilities,
        "weights": _check_weights,
    }
    checks[kind](numbers, arguments.numbers)
    return Question(
        numbers=numbers,
        kind=kind,
        classes=classes,
        label=_read_label(arguments.label, classes),
        smoothing=arguments.smoothing,
        bits=arguments.bits,
    )


def _read_numbers(given: str) -> np.ndarray:
    try:
        return np.array([float(word) for word in given.split(",")])
    except ValueError:
        raise _error("NUMBERS", "numbers with commas between them", given) from None


def _check_logits(logits: np.ndarray, given: str) -> None:
    masked = np.isneginf(logits)
    if not np.all(masked | (np.abs(logits) <= MAX_LOGIT)):
        raise _error("NUMBERS", f"logits from −{MAX_LOGIT:g} to {MAX_LOGIT:g}, or −inf", given)
    if masked.all():
        raise _error("NUMBERS", "at least one logit above −inf", given)


def _check_probabilities(p: np.ndarray, given: str) -> None:
    expected = "probabilities of at least 0 that sum to 1"
    if not np.all(p >= 0):
        raise _error("NUMBERS", f"{expected} (for logits, add --logits)", given)
    if not round(abs(p.sum() - 1), 9) <= 1e-6:  # Rounded: 1 − 0.999999 is a little over 1e-6.
        hints = "(to divide them by their sum, add --normalize; for logits, add --logits)"
        raise _error("NUMBERS", f"{expected} {hints}", f"{given}, which sum to {p.sum():.8g}")


def _check_weights(weights: np.ndarray, given: str) -> None:
    if not (np.all(weights >= 0) and 0 < weights.sum() < np.inf):
        raise _error("NUMBERS", "numbers of at least 0 with a sum above 0, to normalize", given)


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


def answer(question: Question, chain: Chain) -> list[str]:
    """Returns the lines of the whole answer."""
    true_class = question.classes[question.label]
    title = f"Classes: {len(question.classes)}. Truth: {true_class}. Unit: {question.unit}."
    return [
        *paragraph(title),
        "",
        *table(_columns(question, chain)),
        "",
        *definitions(_links(question, chain)),
    ]


def _columns(question: Question, chain: Chain) -> list[list[str]]:
    """Returns the table of the classes, column by column: name and symbol, cells."""
    columns = [
        ["class\nv", *question.classes],
        ["probability\np_v", *map(_decimals, chain.probabilities)],
        ["surprisal\ns_v", *map(_decimals, chain.surprisals)],
        ["truth\nt_v", *map(_decimals, chain.truth)],
        ["gradient\ng_v", *map(_decimals, chain.gradient)],
    ]
    if question.kind != "probabilities":
        name = "logit\nz_v" if question.kind == "logits" else "weight\nw_v"
        columns.insert(1, [name, *map(_decimals, question.numbers)])
    return columns


def _links(question: Question, chain: Chain) -> list[tuple[str, ...]]:
    """Returns the links in words: name, formula with its value, meaning."""
    p, s, t, unit = chain.probabilities, chain.surprisals, chain.truth, question.unit
    truth, loss, error = _formulas(question)
    z_of = {"probabilities": ", z = log p", "weights": ", z = log w"}
    links = [
        (
            "surprisal",
            f"s_v = −{'log2' if question.bits else 'log'} p_v",
            "How surprising class v would be: the less likely, the more.",
        ),
        (
            "entropy",
            f"H(p) = Σ_v p_v · s_v = {_decimals(chain.entropy)} {unit}",
            *_written_out(p, s),
            "The mean surprisal that the prediction itself expects.",
        ),
        ("truth", truth, "The distribution that the prediction is held against."),
        (
            "cross-entropy",
            f"H(t, p) = Σ_v t_v · s_v = {_decimals(chain.cross_entropy)} {unit}",
            *_written_out(t, s),
            "The mean surprisal that the prediction meets where t is the truth.",
        ),
        (
            "loss",
            f"{loss} = {_decimals(chain.loss)} {unit}",
            "lse(z) = log Σ_v exp(z_v)" + z_of.get(question.kind, ""),
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
    if question.kind == "logits":
        formula = "p_v = exp(z_v) / Σ_u exp(z_u)"
        links.insert(0, ("softmax", formula, "The logits as probabilities."))
    elif question.kind == "weights":
        total = _decimals(question.numbers.sum())
        formula = f"p_v = w_v / Σ_u w_u, Σ_u w_u = {total}"
        links.insert(0, ("normalize", formula, "The weights as probabilities."))
    return links


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


def _perplexity_text(chain: Chain) -> str:
    """Returns five digits: exp makes the absolute error of the loss a relative one."""
    if np.isfinite(chain.loss) and not np.isfinite(chain.perplexity):
        return "more than 3.4e+38"
    return f"{chain.perplexity:#.5g}"


def _written_out(shares: np.ndarray, values: np.ndarray) -> list[str]:
    """Returns [a·b + …] for the shares that are not 0; [] where they are too many to read."""
    terms = [f"{_decimals(a)}·{_decimals(b)}" for a, b in zip(shares, values, strict=True) if a > 0]
    return ["= " + " + ".join(terms)] if len(terms) <= MAX_TERMS else []


def _decimals(x: float) -> str:
    """Returns x with four decimals, or four digits where those would not show it."""
    if x == 0 or not np.isfinite(x) or 1e-3 <= abs(x) < 1e5:
        return f"{x + 0.0:.4f}"  # + 0.0 takes the sign from −0.
    return f"{x:.3e}"
