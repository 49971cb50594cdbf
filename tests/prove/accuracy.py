"""How far losses and gradients are from 60 digits of mpmath, in ulps, beside other libraries.

`python tests/prove/accuracy.py FILE` measures and writes the page of the docs. PyTorch is measured
where it is installed. One process holds all of it, and no number depends on the clock.
"""

import dataclasses
import functools
import itertools
import platform
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import mpmath
import numpy as np
import optax

import xentjax

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    torch = None

DIGITS = 60
DTYPES = ("bfloat16", "float16", "float32", "float64")
ALPHA = 0.125  # A share that every dtype holds.


class Exact(NamedTuple):
    """Numbers as hi + lo, two float64 each, and the size in whose ulps an error is counted."""

    hi: np.ndarray
    lo: np.ndarray
    scale: np.ndarray


def exact(values: Sequence[Any], scales: Sequence[Any] | None = None) -> Exact:
    """Returns numbers of mpmath; without scales, each number is its own."""
    hi = np.array([float(x) for x in values])
    lo = np.array([float(x - mpmath.mpf(h)) for x, h in zip(values, hi, strict=True)])
    scale = hi if scales is None else np.array([float(s) for s in scales])
    return Exact(hi, lo, np.abs(scale))


class Errors(NamedTuple):
    """|actual − truth| in ulps of a dtype, and relative to the truth's scale; NaN counts as ∞."""

    ulps: np.ndarray
    relative: np.ndarray


def errors(actual: Any, truth: Exact, dtype: str) -> Errors:
    """Returns the errors of numbers of `dtype`."""
    info, actual = ml_dtypes.finfo(dtype), np.asarray(actual, np.float64)
    scale = np.maximum(truth.scale, float(info.tiny))
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs((actual - truth.hi) - truth.lo)
    # XLA's CPU code makes 0 of what is below the smallest normal number (jaxlib 0.10.2).
    tiny = float(np.finfo(wide(dtype)).tiny)
    error = np.where((truth.scale < tiny) & (np.abs(actual) < tiny), 0, error)
    error = np.where(np.isnan(error), np.inf, error)
    return Errors(error / np.exp2(np.floor(np.log2(scale)) - info.nmant), error / scale)


# The inputs.


class Inputs(NamedTuple):
    """Rows of one kind: logits and second logits [N, V], labels [N], masses [N, V], a mask."""

    kind: str
    z: np.ndarray
    other: np.ndarray
    labels: np.ndarray
    masses: np.ndarray
    keep: np.ndarray | None = None


def leading(rng, rows, classes, labels, low, high):
    """Returns logits of which the label's leads the others by low to high."""
    z = rng.normal(size=(rows, classes)) * 2
    at = np.arange(rows), labels
    z[at] = -np.inf
    z[at] = z.max(-1) + np.linspace(low, high, rows)
    return z


def kinds(rng, rows, classes, labels, dtype) -> Iterator[tuple[str, np.ndarray]]:
    """Yields logits of every kind by its name."""
    info = ml_dtypes.finfo(dtype)
    shape = (rows, classes)
    far = 30000.0 if float(info.max) < 1e5 else 1e8
    yield "random", rng.normal(size=shape) * 3
    yield "confident", leading(rng, rows, classes, labels, 1, 60)
    yield "wrong", leading(rng, rows, classes, labels, -60, -1)
    yield "ties", rng.integers(-1, 2, shape).astype(float)
    yield "spread", rng.uniform(-90, 90, shape)
    yield "offset", far + rng.integers(0, 6, shape) * far * float(info.eps)
    yield "subnormal", rng.uniform(-1, 1, shape) * float(info.tiny) / 4


def make_inputs(dtype: str, rows: int, classes: int, only: Sequence[str] = ()) -> list[Inputs]:
    """Returns inputs of every kind, or of some, whose numbers `dtype` holds."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, rows)
    masses = rng.dirichlet(np.ones(classes), rows).astype(dtype)
    every = []
    for kind, z in kinds(rng, rows, classes, labels, dtype):
        other = rng.normal(size=z.shape) * 3
        every.append(Inputs(kind, z.astype(dtype), other.astype(dtype), labels, masses))
    random = every[0]
    near = (random.z.astype(float) * (1 + 2.0**-6)).astype(dtype)
    every[0] = random._replace(other=near)  # Two predictions near each other.
    keep = rng.random(random.z.shape) < 0.5
    keep[np.arange(rows), labels] = True
    kept = np.where(keep, masses, np.zeros_like(masses))
    every.append(random._replace(kind="masked", keep=keep, masses=kept))
    return [x for x in every if not only or x.kind in only]


# The truth, row by row.


class Row(NamedTuple):
    """One row of inputs as numbers of mpmath, of the classes that are kept."""

    z: list[Any]
    other: list[Any]
    p: list[Any]
    lse: Any
    label: int
    masses: list[Any]
    kept: np.ndarray


def softmax(z: Sequence[Any]) -> tuple[list[Any], Any]:
    """Returns (softmax, log-sum-exp), each exponential of a number taken once."""
    m = max(z)
    known = functools.cache(lambda x: mpmath.exp(x - m))
    e = [known(x) for x in z]
    total = mpmath.fsum(e)
    share = functools.cache(lambda x: known(x) / total)
    return [share(x) for x in z], m + mpmath.log(total)


def read(numbers: np.ndarray) -> list[Any]:
    return [mpmath.mpf(float(x)) for x in numbers]


def rows_of(inputs: Inputs) -> Iterator[Row]:
    for i, label in enumerate(inputs.labels):
        every = np.ones(inputs.z.shape[1], bool)
        kept = every if inputs.keep is None else inputs.keep[i]
        z, other = read(inputs.z[i][kept]), read(inputs.other[i][kept])
        p, lse = softmax(z)
        masses = read(inputs.masses[i][kept])
        yield Row(z, other, p, lse, int(kept[:label].sum()), masses, kept)


def truth_of_masses(row: Row, t: Sequence[Any], label_only: bool = False):
    """Returns (loss, gradient, scales): T · p and t cancel by the problem's own condition."""
    total = mpmath.fsum(t)
    loss = mpmath.fsum(a * (row.lse - x) for a, x in zip(t, row.z, strict=True))
    gradient = [total * p - a for p, a in zip(row.p, t, strict=True)]
    scales = [total * p + a for p, a in zip(row.p, t, strict=True)]
    return loss, loss, gradient, gradient if label_only else scales


def truth_of_labels(row: Row):
    t = [mpmath.mpf(v == row.label) for v in range(len(row.z))]
    return truth_of_masses(row, t, label_only=True)


def truth_of_smoothing(row: Row):
    share = mpmath.mpf(ALPHA) / len(row.z)
    t = [share + (1 - mpmath.mpf(ALPHA)) * (v == row.label) for v in range(len(row.z))]
    return truth_of_masses(row, t)


def truth_of_dense(row: Row):
    return truth_of_masses(row, row.masses)


SOFTMAX_LOSSES = (truth_of_labels, truth_of_smoothing, truth_of_dense)


def truth_of_entropy(row: Row):
    surprisals = [row.lse - z for z in row.z]
    h = mpmath.fsum(p * s for p, s in zip(row.p, surprisals, strict=True))
    gradient = [p * (s - h) for p, s in zip(row.p, surprisals, strict=True)]
    return h, h, gradient, [p * (s + h) for p, s in zip(row.p, surprisals, strict=True)]


def truth_of_divergence(row: Row):
    """KL between softmax(other) and softmax(z), and its derivative to z: q − p of two softmaxes."""
    q, lse = softmax(row.other)
    logits = zip(q, row.z, row.other, strict=True)
    kl = mpmath.fsum(b * ((y - lse) - (x - row.lse)) for b, x, y in logits)
    pairs = list(zip(row.p, q, strict=True))
    apart = min(1, max(abs(mpmath.log(p / q)) for p, q in pairs))
    return kl, kl, [p - q for p, q in pairs], [max(pair) * apart for pair in pairs]


# Elementwise losses: the truth of one (prediction, target) pair.


def truth_of_sigmoid(z, t):
    positive = mpmath.log1p(mpmath.exp(-abs(z))) + max(z, 0)
    up = 1 / (1 + mpmath.exp(-z))
    return positive - t * z, up - t, up + t


def truth_of_binary(p, t):
    loss = -t * mpmath.log(p) - (1 - t) * mpmath.log(1 - p)
    return loss, (p - t) / (p * (1 - p)), (p + t) / (p * (1 - p))


# The contenders: (predictions, targets of the loss, mask of classes) -> losses.


def xent(function):
    return lambda z, t, keep: function(z, t, **({} if keep is None else {"where": keep}))


def behind_mask(function):
    """Gives a contender without a mask logits of −∞ in its place."""

    def masked(z, t, keep):
        return function(z if keep is None else jnp.where(keep, z, -jnp.inf), t)

    return masked


def smoothed_one_hot(z, labels):
    return optax.smooth_labels(jax.nn.one_hot(labels, z.shape[-1], dtype=z.dtype), ALPHA)


def log_p(z, labels):
    return jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], axis=1)[:, 0]


def entropy_of(z):
    return -(jax.nn.softmax(z) * jax.nn.log_softmax(z)).sum(-1)


def divergence_of(z, other):
    log_q = jax.nn.log_softmax(other)
    return (jnp.exp(log_q) * (log_q - jax.nn.log_softmax(z))).sum(-1)


def torch_cross_entropy(z, t, **options):
    return F.cross_entropy(z, t, reduction="none", **options)


def torch_entropy(z, _):
    return torch.distributions.Categorical(logits=z).entropy()


def torch_divergence(z, other):
    log_p, log_q = F.log_softmax(z, -1), F.log_softmax(other, -1)
    return F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss, its truth, and the functions that compute it.

    Attributes:
      name: How the page calls it.
      truth: Row -> (loss, its scale, gradient to the logits, its scales or None).
      target: Inputs -> what the functions take beside the logits.
      jax: Functions of JAX by the name of their library.
      torch: A function of PyTorch's arrays, or None.
      masked: Whether the inputs with a mask are for it.
      kinds: The kinds of inputs; none are all.
    """

    name: str
    truth: Callable[[Row], tuple[Any, Any, Any, Any]]
    target: Callable[[Inputs], np.ndarray]
    jax: dict[str, Callable[..., Any]]
    torch: Callable[..., Any] | None = None
    masked: bool = True
    kinds: tuple[str, ...] = ()


LOSSES = [
    Loss(
        "softmax_cross_entropy of labels",
        truth_of_labels,
        lambda x: x.labels,
        {
            "xentjax": xent(xentjax.softmax_cross_entropy),
            "optax": behind_mask(optax.softmax_cross_entropy_with_integer_labels),
            "jax.nn": behind_mask(lambda z, y: -log_p(z, y)),
        },
        torch_cross_entropy,
    ),
    Loss(
        "softmax_cross_entropy of smoothed labels",
        truth_of_smoothing,
        lambda x: x.labels,
        {
            "xentjax": xent(
                lambda z, y: xentjax.softmax_cross_entropy(z, xentjax.smooth_labels(y, ALPHA))
            ),
            "optax": behind_mask(
                lambda z, y: optax.softmax_cross_entropy(z, smoothed_one_hot(z, y))
            ),
            "jax.nn": behind_mask(
                lambda z, y: -(smoothed_one_hot(z, y) * jax.nn.log_softmax(z)).sum(-1)
            ),
        },
        lambda z, y: torch_cross_entropy(z, y, label_smoothing=ALPHA),
        masked=False,
    ),
    Loss(
        "softmax_cross_entropy of dense targets",
        truth_of_dense,
        lambda x: x.masses,
        {
            "xentjax": xent(xentjax.softmax_cross_entropy),
            "optax": behind_mask(optax.safe_softmax_cross_entropy),
            "jax.nn": behind_mask(
                lambda z, t: -jnp.where(t == 0, 0, t * jax.nn.log_softmax(z)).sum(-1)
            ),
        },
        torch_cross_entropy,
    ),
    Loss(
        "softmax_entropy",
        truth_of_entropy,
        lambda x: x.labels,
        {
            "xentjax": lambda z, _, keep: xentjax.softmax_entropy(z, where=keep),
            "jax.nn": behind_mask(lambda z, _: entropy_of(z)),
        },
        torch_entropy,
    ),
    Loss(
        "softmax_kl_divergence",
        truth_of_divergence,
        lambda x: x.other,
        {
            "xentjax": lambda z, other, keep: xentjax.softmax_kl_divergence(other, z, where=keep),
            "optax": lambda z, other, keep: optax.losses.kl_divergence_with_log_targets(
                jax.nn.log_softmax(z), jax.nn.log_softmax(other)
            ),
            "jax.nn": lambda z, other, keep: divergence_of(z, other),
        },
        torch_divergence,
        masked=False,
        kinds=("random", "confident", "wrong", "ties"),
    ),
]


class ElementwiseLoss(NamedTuple):
    """A loss of pairs; `predictions` makes them of (logits, dtype)."""

    name: str
    truth: Callable[[Any, Any], tuple[Any, Any, Any]]
    predictions: Callable[[np.ndarray, str], np.ndarray]
    jax: dict[str, Callable[..., Any]]
    torch: Callable[..., Any] | None


def probabilities(z: np.ndarray, dtype: str) -> np.ndarray:
    """Returns probabilities strictly between 0 and 1, near both ends too."""
    info = ml_dtypes.finfo(dtype)
    p = 1 / (1 + np.exp(-np.clip(z.astype(float), -80, 80)))
    return np.clip(p, float(info.tiny), 1 - float(info.eps)).astype(dtype)


ELEMENTWISE = [
    ElementwiseLoss(
        "sigmoid_binary_cross_entropy",
        truth_of_sigmoid,
        lambda z, dtype: z,
        {
            "xentjax": xentjax.sigmoid_binary_cross_entropy,
            "optax": optax.sigmoid_binary_cross_entropy,
            "jax.nn": lambda z, t: -t * jax.nn.log_sigmoid(z) - (1 - t) * jax.nn.log_sigmoid(-z),
        },
        None
        if torch is None
        else functools.partial(F.binary_cross_entropy_with_logits, reduction="none"),
    ),
    ElementwiseLoss(
        "binary_cross_entropy",
        truth_of_binary,
        probabilities,
        {
            "xentjax": xentjax.binary_cross_entropy,
            "jax.nn": lambda p, t: -t * jnp.log(p) - (1 - t) * jnp.log1p(-p),
        },
        None if torch is None else functools.partial(F.binary_cross_entropy, reduction="none"),
    ),
]


# The head: numbers of few bits, so that every contender has the same logits.


class HeadInputs(NamedTuple):
    """Inputs [N, D], a kernel [D, V] and labels [N], whose products and sums are exact."""

    inputs: np.ndarray
    kernel: np.ndarray
    labels: np.ndarray


def make_head_inputs(dtype: str, rows: int, classes: int) -> HeadInputs:
    rng = np.random.default_rng(1)
    inputs, kernel = rng.integers(-3, 4, (rows, 8)), rng.integers(-4, 5, (8, classes)) / 2
    return HeadInputs(inputs.astype(dtype), kernel.astype(dtype), rng.integers(0, classes, rows))


HEAD = {
    "xentjax": lambda x, kernel, y: xentjax.linear_softmax_cross_entropy(
        x, kernel, y, reduction="none"
    ),
    "optax": lambda x, kernel, y: optax.softmax_cross_entropy_with_integer_labels(x @ kernel, y),
    "jax.nn": lambda x, kernel, y: -log_p(x @ kernel, y),
}


# The measurement.


class Measured(NamedTuple):
    """Errors of one contender on one kind of inputs.

    The bound is that of the contract, on relative errors; None where it says nothing.
    """

    loss_name: str
    dtype: str
    kind: str
    classes: int
    contender: str
    loss: Errors
    gradient: Errors
    bound: float | None


@functools.cache
def compiled(function):
    """Returns (losses, gradient) of a contender; a case compiles once for each shape and dtype."""

    def both(z, t, keep):
        def total(z):
            losses = function(z, t, keep)
            return losses.astype(jnp.promote_types(losses.dtype, jnp.float32)).sum(), losses

        (_, losses), gradient = jax.value_and_grad(total, has_aux=True)(z)
        return losses, gradient

    return jax.jit(both)


def of_torch(function, z, t):
    """Returns PyTorch's (losses, gradient), or None where it has no such kernel."""

    def tensor(x):
        if x.dtype.kind in "iu":
            return torch.tensor(x)
        wide = torch.tensor(np.asarray(x, np.float64))
        return wide.to(getattr(torch, str(x.dtype)))

    logits = tensor(z).requires_grad_()
    targets = tuple(map(tensor, t)) if isinstance(t, tuple) else tensor(t)
    try:
        losses = function(logits, targets)
        losses.double().sum().backward()
    except (RuntimeError, NotImplementedError):
        return None
    return losses.detach().double().numpy(), logits.grad.double().numpy()


def answers(functions, torch_function, z, t, keep) -> Iterator[tuple[str, Any, Any]]:
    """Yields (contender, losses, gradient)."""
    with jax.enable_x64(z.dtype == np.float64):
        for name, function in functions.items():
            yield name, *map(np.asarray, compiled(function)(z, t, keep))
    if torch is not None and torch_function is not None:
        masked = z if keep is None else np.where(keep, z, np.asarray(-np.inf, z.dtype))
        answer = of_torch(torch_function, masked, t)
        if answer is not None:
            yield "torch", *answer


def wide(dtype: str) -> str:
    """Returns the dtype of losses: float32, and float64 for float64."""
    return "float64" if dtype == "float64" else "float32"


def contract(inputs: Inputs) -> float:
    """Returns the relative error that the contract allows: the larger of two.

    They are 1e-6 in float32 and as many ulps in float64, and half an ulp of the largest m − z_v
    whose exponential is not 0.
    """
    info = np.finfo(wide(str(inputs.z.dtype)))
    z = inputs.z.astype(np.float64)
    if inputs.keep is not None:
        z = np.where(inputs.keep, z, -np.inf)
    gaps = z.max(-1, keepdims=True) - z
    seen = gaps[gaps <= 1 - np.log(float(info.smallest_subnormal))]
    return float(info.eps) * max(1e-6 * 2**23, seen.max() / 2)


def measure_rows(loss: Loss, inputs: Inputs, rows: Sequence[Row]) -> Iterator[Measured]:
    """Yields what each contender's errors are on one kind of inputs."""
    dtype = str(inputs.z.dtype)
    losses, scales, gradients, kept = [], [], [], []
    for row in rows:
        value, scale, entries, entry_scales = loss.truth(row)
        losses.append(value)
        scales.append(scale)
        gradients.append(exact(entries, entry_scales))
        kept.append(row.kept)
    truth = exact(losses, scales)
    gradient_truth = Exact(*(np.concatenate(parts) for parts in zip(*gradients, strict=True)))
    bound = contract(inputs) if loss.truth in SOFTMAX_LOSSES else None
    found = answers(loss.jax, loss.torch, inputs.z, loss.target(inputs), inputs.keep)
    for contender, values, gradient in found:
        yield Measured(
            loss.name,
            dtype,
            inputs.kind,
            inputs.z.shape[-1],
            contender,
            errors(values, truth, wide(dtype)),
            errors(gradient[np.stack(kept)], gradient_truth, dtype),
            bound,
        )


def measure_pairs(loss: ElementwiseLoss, inputs: Inputs) -> Iterator[Measured]:
    """The same for losses of pairs."""
    dtype = str(inputs.z.dtype)
    predictions = loss.predictions(inputs.z, dtype)
    targets = inputs.masses
    pairs = zip(read(predictions.ravel()), read(targets.ravel()), strict=True)
    values, gradients, scales = zip(*itertools.starmap(loss.truth, pairs), strict=True)
    truth, gradient_truth = exact(values), exact(gradients, scales)
    functions = {name: _without_mask(f) for name, f in loss.jax.items()}
    for contender, losses, gradient in answers(functions, loss.torch, predictions, targets, None):
        yield Measured(
            loss.name,
            dtype,
            inputs.kind,
            predictions.shape[-1],
            contender,
            errors(losses.ravel(), truth, wide(dtype)),
            errors(gradient.ravel(), gradient_truth, dtype),
            None,
        )


def measure_head(dtype: str, rows: int, classes: int) -> Iterator[Measured]:
    """The same for the head, with its gradient to the inputs."""
    x, kernel, labels = make_head_inputs(dtype, rows, classes)
    logits = x.astype(float) @ kernel.astype(float)
    masses = np.zeros_like(logits)
    losses, gradients = [], []
    for row in rows_of(Inputs("random", logits, logits, labels, masses)):
        loss, _, errors_of_p, _ = truth_of_labels(row)
        losses.append(loss)
        terms = [[e * w for e, w in zip(errors_of_p, read(k), strict=True)] for k in kernel]
        gradients.append(exact(list(map(mpmath.fsum, terms)), [sum(map(abs, t)) for t in terms]))
    truth = exact(losses)
    gradient_truth = Exact(*(np.stack(parts) for parts in zip(*gradients, strict=True)))
    functions = {name: _of_kernel(f) for name, f in HEAD.items()}
    for contender, values, gradient in answers(
        functions, lambda z, t: torch_cross_entropy(z @ t[0], t[1]), x, (kernel, labels), None
    ):
        yield Measured(
            "linear_softmax_cross_entropy of labels",
            dtype,
            "random",
            classes,
            contender,
            errors(values, truth, wide(dtype)),
            errors(gradient, gradient_truth, dtype),
            None,
        )


@functools.cache
def _of_kernel(function):
    return lambda x, t, keep: function(x, *t)


@functools.cache
def _without_mask(function):
    return lambda z, t, keep: function(z, t)


SHAPES = [
    (128, 10, ()),
    (8, 1000, ("random", "confident", "masked")),
    (1, 131072, ("random", "confident")),
]
"""Rows, classes, and the kinds of inputs of that size; none are all."""


def measure(
    dtypes: Sequence[str] = DTYPES, shapes: Sequence[tuple[int, int, Any]] = tuple(SHAPES)
) -> list[Measured]:
    """Measures every loss."""
    found = []
    with mpmath.workdps(DIGITS):
        for dtype, (rows, classes, only) in itertools.product(dtypes, shapes):
            for inputs in make_inputs(dtype, rows, classes, only):
                found.extend(measure_inputs(inputs))
            if classes <= 1000:
                found.extend(measure_head(dtype, rows, classes))
    return found


def measure_inputs(inputs: Inputs) -> Iterator[Measured]:
    """Yields what is measured on one kind of inputs."""
    rows, classes = list(rows_of(inputs)), inputs.z.shape[-1]
    for loss in LOSSES:
        fits = (loss.masked or inputs.keep is None) and (
            not loss.kinds or inputs.kind in loss.kinds
        )
        if fits and (classes <= 1000 or loss.truth in SOFTMAX_LOSSES):
            yield from measure_rows(loss, inputs, rows)
    if inputs.kind in ("random", "confident", "wrong", "spread") and classes == 10:
        for pairs in ELEMENTWISE:
            yield from measure_pairs(pairs, inputs)


# The page.


def number(x: float) -> str:
    """Returns an error in ulps as text."""
    if not np.isfinite(x):
        return "∞"
    if x >= 1e4:
        digit, power = f"{x:.0e}".split("e")
        return f"{digit}e{int(power)}"
    return f"{x:.1f}" if x < 100 else f"{x:.0f}"


def cell(found: Errors) -> str:
    highest, most = found.ulps.max(), np.percentile(found.ulps, 99, method="lower")
    return f"{number(highest)} ({number(most)})"


ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Half an ulp, relative, of the narrow dtypes: what rounding a gradient to them costs."""


def beyond_contract(m: Measured) -> list[str]:
    """Returns what of xentjax, loss or gradient, is beyond the contract, as text."""
    if m.bound is None:
        return []
    bounds = {"loss": m.bound, "gradient": m.bound + ROUNDING.get(m.dtype, 0)}
    worst = {part: getattr(m, part).relative.max() for part in bounds}
    where = f"{m.loss_name}, {m.dtype}, {m.kind}, {m.classes} classes"
    return [
        f"{part} of {where}: {worst[part]:.2g} > {bound:.2g}"
        for part, bound in bounds.items()
        if worst[part] > bound
    ]


class Comparison(NamedTuple):
    """The largest errors in ulps of xentjax and of another on the same inputs."""

    where: str
    ours: float
    other: float


def comparisons(found: Sequence[Measured], other: str = "optax") -> list[Comparison]:
    """Returns xentjax beside another contender, for each loss and gradient that both have."""

    def key(m):
        return m.loss_name, m.dtype, m.kind, m.classes

    others = {key(m): m for m in found if m.contender == other}
    return [
        Comparison(
            f"{part} of {', '.join(map(str, key(m)))}",
            getattr(m, part).ulps.max(),
            getattr(others[key(m)], part).ulps.max(),
        )
        for m in found
        if m.contender == "xentjax" and key(m) in others
        for part in ("loss", "gradient")
    ]


def comparison_text(found: Sequence[Measured]) -> str:
    every = comparisons(found)
    above = [c for c in every if c.ours > c.other]
    worst = max(above, key=lambda c: c.ours - c.other)
    share = sum(c.other > 2 * c.ours for c in every)
    return textwrap.fill(
        f"optax has {len(every)} of the largest errors below too. {share} of them are more than "
        f"twice as large there. {len(above)} are smaller there, by {worst.ours - worst.other:.1f} "
        f"ulps at most: {worst.ours:.1f} here and {worst.other:.1f} there ({worst.where}). The "
        "entropy's errors of 1e7 ulps are those of entropies near 1e-37, made of an exponential "
        "that is below the smallest normal number.",
        98,
    )


CONTENDERS = ("xentjax", "optax", "jax.nn", "torch")

INTRODUCTION = """# Accuracy

Each number is an error in ulps, units in the last place, against {digits} digits of mpmath: the
largest, and in brackets the 99th percentile. Losses count in ulps of float32, and of float64 for
float64 logits, since that is what xentjax returns; gradients count in ulps of the dtype of the
logits. 0.5 is a number rounded correctly, and ∞ is a NaN or an infinity where the truth is a
number.

An error counts in the ulps of the truth itself, with these exceptions. An entry of a gradient
that is a difference by the problem's own nature counts in the ulps of the sum: T · p + t for
smoothed and dense targets, p · (surprisal + entropy) for the entropy, Σ |terms| for the head's
gradient to its inputs. The divergence's q − p counts in those of max(p, q), times the largest |log
p − log q| of the row where that is below 1. A truth below the smallest normal number of the
arithmetic is met by any number below it, since XLA's CPU code makes 0 of those (jaxlib 0.10.2).

Every contender gets the same numbers and is called as its users call it. In bfloat16 and float16
the others compute and return in that dtype, hence their large errors there. A contender without a
mask gets logits of −∞.

The inputs: *random* (normal, σ = 3; for the divergence, two predictions that differ by 1/64),
*confident* and *wrong* (the label leads, or trails, by 1 to 60), *ties* (logits −1, 0, 1),
*spread* (uniform in ±90), *offset* (near 1e8, or 3e4 in float16, a few ulps apart), *subnormal*
(logits below the smallest normal number), and *masked* (half of the classes masked out). 128 rows
of 10 classes, 8 of 1000, 1 of 131072.

The contract: the relative error of a softmax cross-entropy, and of each entry of its gradient, is
at most 1e-6 in float32 (8.4 ulps; as many in float64), or half an ulp of the largest m − z_v
whose exponential is not 0, whichever is larger; a gradient in bfloat16 or float16 is rounded once
more. `make prove` measures again, and fails where that does not hold.

{comparison}

Measured by `python tests/prove/accuracy.py docs/accuracy.md` on the CPU ({machine}), with
{versions}.
"""


def page(found: Sequence[Measured]) -> str:
    """Returns the page of the docs."""
    versions = [f"jax {jax.__version__}", f"optax {optax.__version__}"]
    versions += [] if torch is None else [f"torch {torch.__version__.split('+')[0]}"]
    text = INTRODUCTION.format(
        digits=DIGITS,
        versions=", ".join(versions),
        machine=platform.machine(),
        comparison=comparison_text(found),
    )
    names = list(dict.fromkeys(m.loss_name for m in found))
    text += "\n## Largest error over all inputs\n\nLoss, then gradient.\n\n"
    text += _heading("loss", "dtype", *CONTENDERS)
    for name, dtype in itertools.product(names, DTYPES):
        cells = []
        for contender in CONTENDERS:
            some = [
                m for m in found if (m.loss_name, m.dtype, m.contender) == (name, dtype, contender)
            ]
            parts = [
                max(getattr(m, part).ulps.max() for m in some)
                for part in ("loss", "gradient")
                if some
            ]
            cells.append(", ".join(map(number, parts)) or "—")
        text += _line(f"`{name.split()[0]}`{name[len(name.split()[0]) :]}", dtype, *cells)
    for name in names:
        title, _, rest = name.partition(" ")
        text += f"\n## `{title}` {rest}".rstrip() + "\n\n"
        columns = [f"{c} {part}" for c in CONTENDERS for part in ("loss", "∇")]
        text += _heading("dtype", "inputs", *columns)
        some = [m for m in found if m.loss_name == name]
        for key in dict.fromkeys((m.dtype, m.kind, m.classes) for m in some):
            by = {m.contender: m for m in some if (m.dtype, m.kind, m.classes) == key}
            cells = [
                cell(getattr(by[c], part)) if c in by else "—"
                for c in CONTENDERS
                for part in ("loss", "gradient")
            ]
            size = "" if key[2] == 10 else f", V = {key[2]}"
            text += _line(key[0], key[1] + size, *cells)
    return text


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |\n"


def _heading(*cells: str) -> str:
    return _line(*cells) + "|---" * len(cells) + "|\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(measure()), encoding="utf-8")
