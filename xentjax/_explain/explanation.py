"""`explain`: every number between a prediction and the gradient of its loss."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import ArrayLike

from xentjax._jax import checks
from xentjax._losses.information import surprisal
from xentjax._losses.sigmoid import sigmoid_binary_cross_entropy
from xentjax._losses.softmax import softmax_cross_entropy
from xentjax._losses.softmax_information import softmax_surprisal
from xentjax._targets.transforms import dense_targets
from xentjax._targets.types import SparseTargets, Targets

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GIVEN = ("logits", "probabilities", "weights")
LINKS = ("softmax", "sigmoid")
MAX_LOGIT = 1e300  # Any two such logits have a difference that float64 holds.


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """Every link from predictions to their losses: print it, show it in a notebook, or plot it.

    loss = Σ_v t_v · s_v,   s_v = −log p_v,   ∂loss/∂z_v = T · p_v − t_v,   T = Σ_v t_v

    For sigmoid it is Σ_v (t_v · s_v + (1 − t_v) · s̄_v), where s̄_v = −log(1 − p_v). Arrays are
    NumPy's, of float64, for predictions [..., V]. `e[i]` is that of one example of a batch.

    Attributes:
      classes: The names of the V classes.
      given: The kind of the prediction: "logits", "probabilities" or "weights".
      link: From logits to probabilities: "softmax", or "sigmoid" for a yes or no for each class.
      base: The base of the logarithms; None is e, for nats.
      prediction: The numbers as given, [..., V].
      logits: z, [..., V]; log p for probabilities.
      targets: The mass t_v on each class, [..., V].
      surprisals: s_v, [..., V], in nats or units of the base, as all that follow.
      surprisals_of_no: s̄_v, [..., V], for sigmoid; None for softmax.
      losses: One for each example, [...].
      gradients: ∂loss/∂z, [..., V].

    Example:
      >>> import xentjax
      >>> e = xentjax.explain([0.1, 0.2, 0.7], 2, given="probabilities", classes=["a", "b", "c"])
      >>> print(e.losses, e.entropy, e.gradients)
      0.35667 0.80182 [ 0.1  0.2 -0.3]
    """

    classes: tuple[str, ...]
    given: str
    link: str
    base: float | None
    prediction: np.ndarray
    logits: np.ndarray
    targets: np.ndarray
    surprisals: np.ndarray
    surprisals_of_no: np.ndarray | None
    losses: np.ndarray
    gradients: np.ndarray

    @property
    def unit(self) -> str:
        """The unit of information: nats, bits, or units of another base."""
        names = {None: "nats", 2: "bits"}
        return names.get(self.base) or f"units of base {self.base:g}"

    @property
    def probabilities(self) -> np.ndarray:
        """p_v, [..., V]."""
        return np.exp(-self.surprisals * _nats(self.base))

    @property
    def mass(self) -> np.ndarray:
        """T = Σ_v t_v, [...]: 1, unless classes are weighted or answers are yes or no."""
        return self.targets.sum(-1)

    @property
    def shares(self) -> np.ndarray:
        """The part of the loss that each class adds, [..., V]."""
        shares = _products(self.targets, self.surprisals)
        if self.surprisals_of_no is None:
            return shares
        return shares + _products(1 - self.targets, self.surprisals_of_no)

    @property
    def entropy(self) -> np.ndarray:
        """H(p) = Σ p · s, the loss that the prediction itself expects, [...]."""
        _, surprisals = self._outcomes()
        return _products(np.exp(-surprisals * _nats(self.base)), surprisals).sum(-1)

    @property
    def target_entropy(self) -> np.ndarray:
        """H(t) of the targets divided by their mass: no prediction's loss is less, [...]."""
        truth, _ = self._outcomes()
        return 0.0 + _products(truth, -_log(truth)).sum(-1) / _nats(self.base)

    @property
    def cross_entropy(self) -> np.ndarray:
        """H(t, p) = Σ t · s of the targets divided by their mass; the loss is T times that."""
        return _products(*self._outcomes()).sum(-1)

    @property
    def kl_divergence(self) -> np.ndarray:
        """KL(t ‖ p) = H(t, p) − H(t), the most that a better prediction saves, [...]."""
        truth, surprisals = self._outcomes()
        own = _log(np.where(truth == 0, 1.0, truth)) / _nats(self.base)  # 0 · log 0 = 0.
        return _products(truth, own + surprisals).sum(-1)

    @property
    def perplexity(self) -> np.ndarray:
        """A number of equally likely outcomes, exp H(t, p) in nats, [...]."""
        with np.errstate(over="ignore"):
            return np.exp(self.cross_entropy * _nats(self.base))

    def __getitem__(self, index: Any) -> "Explanation":
        """Returns the explanation of one example, or of some, of a batch."""
        arrays = {k: v for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        return dataclasses.replace(self, **{name: x[index] for name, x in arrays.items()})

    def __str__(self) -> str:
        """Returns the table of each example and its links in words, as wide as the terminal."""
        from xentjax._explain.report import report  # noqa: PLC0415  Most scripts print none.

        return report(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Returns a table with bars, which Jupyter shows."""
        from xentjax._explain.html import as_html  # noqa: PLC0415  Most scripts show none.

        return as_html(self)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draws prediction, target and the steps between them; needs the extra `plot`."""
        from xentjax.plot import steps_to_target  # noqa: PLC0415  matplotlib is an extra.

        total = 1.0 if self.link == "sigmoid" else self.mass[..., None]
        ax = steps_to_target(total * self.probabilities, self.targets, classes=self.classes, ax=ax)
        ax.set_title(f"loss = {float(self.losses):.4f} {self.unit}")
        return ax

    def _outcomes(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (truth, surprisals) of all outcomes: V classes, or V times yes and no."""
        if self.surprisals_of_no is None:
            mass = self.mass[..., None]
            return self.targets / np.where(mass == 0, 1.0, mass), self.surprisals
        truth = np.concatenate([self.targets, 1 - self.targets], -1)
        return truth, np.concatenate([self.surprisals, self.surprisals_of_no], -1)


def explain(
    prediction: ArrayLike | Sequence[Any],
    targets: Targets,
    *,
    given: Literal["logits", "probabilities", "weights"] = "logits",
    link: Literal["softmax", "sigmoid"] = "softmax",
    base: float | None = None,
    classes: Sequence[str] | None = None,
) -> Explanation:
    """Explains the loss of one prediction or a few: every link from surprisal to gradient.

    loss = Σ_v t_v · s_v,   s_v = −log p_v,   ∂loss/∂z_v = T · p_v − t_v,   T = Σ_v t_v

    With link="sigmoid", each class has a yes and a no, whose losses add. The numbers are those of
    `softmax_cross_entropy` or `sigmoid_binary_cross_entropy` in float64, whatever `jax_enable_x64`
    says. `explain` reads values, so it runs outside `jax.jit`.

    Args:
      prediction: Logits, probabilities or weights, [..., V].
      targets: For softmax, labels int[...], dense float[..., V] or SparseTargets; for sigmoid the
        truth of each class in [0, 1], of the shape of the prediction.
      given: The kind of the prediction: "logits", "probabilities", or "weights", which softmax
        takes to be divided by their sum.
      link: "softmax" for one class out of many, "sigmoid" for a yes or no for each class.
      base: The base of the logarithm: 2 gives bits; None is e, for nats.
      classes: The names of the V classes; None numbers them from 0.

    Returns:
      An Explanation: `print` it, leave it at the end of a notebook's cell, or call its `plot`.

    Raises:
      ValueError: Numbers are no logits, probabilities or weights, targets do not fit them, or an
        option is none of those named.
      TypeError: prediction is traced, or an argument has a dtype or type that cannot be one.

    Example:
      >>> import xentjax
      >>> animals = ["panda", "bird", "dog"]
      >>> e = xentjax.explain([0.1, 0.2, 0.7], 2, given="probabilities", classes=animals)
      >>> print(e)
      Classes: 3. Truth: dog. Unit: nats.
      <BLANKLINE>
      class  probability  surprisal   truth    share  gradient
      v              p_v        s_v     t_v  t_v·s_v       g_v
      ────────────────────────────────────────────────────────
      panda       0.1000     2.3026  0.0000   0.0000    0.1000
      bird        0.2000     1.6094  0.0000   0.0000    0.2000
      dog         0.7000     0.3567  1.0000   0.3567   -0.3000
      ...

    Source:
      Shannon, A Mathematical Theory of Communication, 1948, section 6.
    """
    checks.check(given in GIVEN, f"given: expected one of {GIVEN}, got {given!r}")
    checks.check(link in LINKS, f"link: expected one of {LINKS}, got {link!r}")
    checks.check(
        (given, link) != ("weights", "sigmoid"),
        "given: expected 'logits' or 'probabilities' beside link='sigmoid', got 'weights'",
    )
    numbers = _as_numbers(prediction)
    logits = _as_logits(numbers, given, link, _tolerance(prediction))
    names = _as_names(classes, numbers.shape[-1])
    with jax.enable_x64(True):
        functions = {"softmax": _softmax_links, "sigmoid": _sigmoid_links}
        links = functions[link](jnp.asarray(logits), _in_float64(targets))
        dense, surprisals, of_no, losses, gradients = jax.tree.map(np.asarray, links)
        half = jnp.asarray(0.5, jnp.float64)
        unit = float(surprisal(half, base=base)) / math.log(2)  # It checks the base too.
    checks.check(
        bool(np.isfinite(dense).all()),
        f"targets: expected labels in [0, {len(names)}) and finite mass, got {_shown(targets)}",
    )
    return Explanation(
        classes=names,
        given=given,
        link=link,
        base=base,
        prediction=numbers,
        logits=logits,
        targets=dense,
        surprisals=surprisals * unit,
        surprisals_of_no=None if of_no is None else of_no * unit,
        losses=losses * unit,
        gradients=gradients * unit,
    )


def _softmax_links(logits, targets):
    """Returns targets, surprisals, none of the other side, losses and gradients, in nats."""

    def loss(z):
        return softmax_cross_entropy(z, targets)

    losses, pullback = jax.vjp(loss, logits)
    (gradients,) = pullback(jnp.ones_like(losses))
    dense = dense_targets(targets, logits.shape[-1])
    return dense.astype(jnp.float64), softmax_surprisal(logits), None, losses, gradients


def _sigmoid_links(logits, targets):
    """Returns targets, surprisals of yes and of no, losses and gradients, in nats."""

    def loss(z):
        return sigmoid_binary_cross_entropy(z, targets)

    losses, pullback = jax.vjp(loss, logits)
    (gradients,) = pullback(jnp.ones_like(losses))
    dense = jnp.asarray(targets).astype(jnp.float64)
    yes, no = jnp.ones_like(logits), jnp.zeros_like(logits)
    surprisals = (sigmoid_binary_cross_entropy(logits, answer) for answer in (yes, no))
    return dense, *surprisals, losses.sum(-1), gradients


def _as_numbers(prediction: Any) -> np.ndarray:
    """Returns a prediction as float64[..., V]."""
    checks.check(
        not isinstance(prediction, Tracer),
        "prediction: expected values, got a traced array; explain reads values outside jax.jit",
        TypeError,
    )
    try:
        numbers = np.asarray(prediction, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"prediction: expected numbers, got {prediction!r}") from None
    checks.check(
        numbers.ndim > 0 and numbers.shape[-1] > 0,
        f"prediction: expected numbers [..., V] of at least one class, got shape {numbers.shape}",
    )
    return numbers


def _tolerance(prediction: Any) -> float:
    """Returns by how much a sum of probabilities of that dtype may differ from 1."""
    dtype = getattr(prediction, "dtype", np.dtype(np.float64))
    is_floating = jnp.issubdtype(dtype, jnp.floating)
    return max(1e-6, 16 * float(jnp.finfo(dtype).eps)) if is_floating else 1e-6


def _as_logits(numbers: np.ndarray, given: str, link: str, tolerance: float) -> np.ndarray:
    """Returns float64 logits: log p for probabilities; raises ValueError for other numbers."""
    if given == "logits":
        _check_logits(numbers, link)
        return numbers
    if link == "sigmoid":
        inside = bool(np.all((numbers >= 0) & (numbers <= 1)))
        expected = "prediction: expected probabilities from 0 to 1"
        checks.check(inside, f"{expected}, got {_shown(numbers)}")
        return _log(numbers) - _log(1 - numbers)
    if given == "weights":
        _check_weights(numbers)
    else:
        _check_distributions(numbers, tolerance)
    return _log(numbers)


def _check_logits(logits: np.ndarray, link: str) -> None:
    masked = np.isinf(logits) if link == "sigmoid" else np.isneginf(logits)
    checks.check(
        bool(np.all(masked | (np.abs(logits) <= MAX_LOGIT))),
        f"prediction: expected logits from −{MAX_LOGIT:g} to {MAX_LOGIT:g}, or −inf, "
        f"got {_shown(logits)}",
    )
    checks.check(
        link == "sigmoid" or not masked.all(-1).any(),
        f"prediction: expected at least one logit above −inf, got {_shown(logits)}",
    )


def _check_distributions(p: np.ndarray, tolerance: float) -> None:
    expected = "prediction: expected probabilities of at least 0 that sum to 1"
    checks.check(bool(np.all(p >= 0)), f"{expected}, got {_shown(p)}")
    sums = p.sum(-1)
    # Rounded: 1 − 0.999999 is a little over 1e-6.
    far = ~(np.round(np.abs(sums - 1), 9) <= tolerance)
    if far.any():
        worst = sums.flat[int(np.argmax(far))]
        raise ValueError(f"{expected}, got {_shown(p)}, which sum to {worst:.8g}")


def _check_weights(weights: np.ndarray) -> None:
    sums = weights.sum(-1)
    checks.check(
        bool(np.all(weights >= 0) and np.all((sums > 0) & (sums < np.inf))),
        f"prediction: expected weights of at least 0 with a sum above 0, got {_shown(weights)}",
    )


def _as_names(classes: Sequence[str] | None, count: int) -> tuple[str, ...]:
    if classes is None:
        return tuple(map(str, range(count)))
    names = tuple(map(str, classes))
    checks.check(
        len(names) == count and len(set(names)) == count and all(names),
        f"classes: expected {count} different names, one for each class, got {list(names)}",
    )
    return names


def _in_float64(targets: Any) -> Any:
    """Returns targets with their floating mass in float64."""

    def wide(x):
        is_floating = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(jnp.float64) if is_floating else x

    return jax.tree.map(wide, targets) if isinstance(targets, SparseTargets) else wide(targets)


def _nats(base: float | None) -> float:
    """Returns one unit of a base in nats."""
    return 1.0 if base is None else math.log(base)


def _log(x: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):  # log 0 = −inf: a class of probability 0.
        return np.log(x)


def _products(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns weights · values, and 0 where the weight is 0: 0 · log 0 = 0."""
    return np.where(weights == 0, 0.0, weights) * np.where(weights == 0, 0.0, values)


def _shown(x: Any) -> str:
    """Returns the values of an array in one short line."""
    if isinstance(x, SparseTargets):
        return repr(x)
    return np.array2string(np.asarray(x), threshold=12, separator=", ").replace("\n", "")
