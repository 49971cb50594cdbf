"""Losses as curves, over the simplex, and over two directions of their parameters."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes

from xentjax._jax import checks
from xentjax._losses.sigmoid import binary_cross_entropy, sigmoid_binary_cross_entropy
from xentjax._losses.softmax import softmax_cross_entropy
from xentjax._targets.types import SparseTargets, Targets, as_targets
from xentjax.plot._axes import GREY, axes, colour, names_of, nats, unit

NUM_POINTS = 400
MARGINS = np.linspace(0, 40, 161)
SIMPLEX_STEPS = 48  # Points along one side of the triangle.
SIMPLEX_ARROWS = 7  # Arrows along one side.
SIMPLEX_EDGE = 0.004  # The least probability drawn: at 0 the loss may be infinite.
CORNERS = np.array([[0, 0], [1, 0], [0.5, math.sqrt(3) / 2]])


def log_loss(*, base: float | None = None, ax: Axes | None = None) -> Axes:
    """Draws the binary log loss by the predicted probability, for both labels.

    loss = −log p for y = 1,   loss = −log(1 − p) for y = 0

    Args:
      base: The base of the logarithm: 2 gives bits; None is e, for nats.
      ax: The axes to draw into; None takes pyplot's current ones.

    Returns:
      The axes.

    Raises:
      TypeError: ax is no Axes.

    Example:
      >>> import matplotlib.pyplot as plt
      >>> import xentjax.plot
      >>> _, ax = plt.subplots()
      >>> xentjax.plot.log_loss(ax=ax).get_ylabel()
      'loss (nats)'

    Source:
      Good, Rational Decisions, 1952, section 8.
    """
    ax, p = axes(ax), np.linspace(0.003, 0.997, NUM_POINTS, dtype=np.float32)
    for y, x, name, side in (
        (1, 0.07, "y = 1: −log p", "left"),
        (0, 0.93, "y = 0: −log(1 − p)", "right"),
    ):
        losses = np.asarray(binary_cross_entropy(p, np.full(p.shape, y))) / nats(base)
        line = ax.plot(p, losses, color=colour(1 - y), ls="-" if y else "--", label=name)
        ax.text(x, 3.6 / nats(base), name, color=line[0].get_color(), ha=side)
        ax.text(x, 3.1 / nats(base), "confident and wrong", color=GREY, ha=side)
    undecided = math.log(2) / nats(base)
    ax.plot(0.5, undecided, "o", color=GREY)
    text = "undecided: log 2" if base is None else f"undecided: {undecided:.4g}"
    ax.annotate(text, (0.5, undecided), (0, 20), textcoords="offset points", ha="center")
    ax.set(xlim=(0, 1), ylim=(0, 5 / nats(base)), title="Log loss for both labels")
    ax.set(xlabel="predicted probability of y = 1, p", ylabel=f"loss ({unit(base)})")
    return ax


def log_loss_beside_difference(*, slopes: bool = False, ax: Axes | None = None) -> Axes:
    """Draws the log loss of the right answer beside the plain difference from 1, or their slopes.

    The curves are −log p and 1 − p by p; the slopes are p − 1 and −p · (1 − p) by z, for p = σ(z).

    Args:
      slopes: Whether to draw the slopes in the logit, which training sees.
      ax: The axes to draw into; None takes pyplot's current ones.

    Returns:
      The axes.

    Raises:
      TypeError: slopes is no flag, or ax is no Axes.

    Example:
      >>> import matplotlib.pyplot as plt
      >>> import xentjax.plot
      >>> _, ax = plt.subplots()
      >>> xentjax.plot.log_loss_beside_difference(slopes=True, ax=ax).get_xlabel()
      'logit of the right answer, z'

    Source:
      Golik, Doetsch and Ney, Cross-Entropy vs. Squared Error Training, 2013.
    """
    ax = axes(ax)
    checks.check_flag("slopes", slopes)
    z = jnp.linspace(-9, 6, NUM_POINTS, dtype=jnp.float32)
    ones = jnp.ones_like(z)
    curves = {
        "log loss, −log p": lambda z: sigmoid_binary_cross_entropy(z, ones),
        "difference, 1 − p": lambda z: jax.nn.sigmoid(-z),  # 1 − σ(z) cancels.
    }
    x = z if slopes else jax.nn.sigmoid(z)
    for i, (name, curve) in enumerate(curves.items()):
        values, pullback = jax.vjp(curve, z)
        y = pullback(ones)[0] if slopes else values
        ax.plot(x, y, color=colour(i), ls="--" if i else "-", label=name)
    if slopes:
        ax.set(xlim=(-9, 6), ylim=(-1.1, 0.15), title="The slope that training sees")
        ax.set(xlabel="logit of the right answer, z", ylabel="slope in the logit (1 / nat)")
        ax.legend(loc="lower right")
    else:
        ax.set(xlim=(0, 1), ylim=(0, 6), title="The cost of a prediction")
        ax.set(xlabel="probability of the right answer, p", ylabel="log loss (nats); difference")
        ax.legend(loc="upper right")
    return ax


def margin(
    quantity: Literal["loss", "gradient"] = "gradient",
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    ax: Axes | None = None,
) -> Axes:
    """Draws loss or gradient by the margin of the right class over one other, naive and exact.

    The naive loss is lse(z) − z_y, with autodiff's gradient; the exact one `softmax_cross_entropy`.

    Args:
      quantity: "loss", or "gradient" for the size of the right class's entry.
      dtype: That of the logits; the naive formula stays in it.
      ax: The axes to draw into; None takes pyplot's current ones.

    Returns:
      The axes, with margins shaded from the first at which the naive formula gives 0.

    Raises:
      ValueError: quantity is neither of the two.
      TypeError: ax is no Axes.

    Example:
      >>> import matplotlib.pyplot as plt
      >>> import xentjax.plot
      >>> _, ax = plt.subplots()
      >>> xentjax.plot.margin("loss", ax=ax).get_ylabel()
      'loss (nats)'

    Source:
      Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 1.7.
    """
    kinds = ("loss", "gradient")
    checks.check(quantity in kinds, f"quantity: expected one of {kinds}, got {quantity!r}")
    ax = axes(ax)
    logits = jnp.asarray(np.stack([MARGINS + 5, np.full_like(MARGINS, 5)], -1)).astype(dtype)
    exact, rounded = _sizes(logits)[quantity]
    ax.plot(MARGINS, exact, color=colour(0), label="xentjax")
    kept = np.where(rounded > 0, rounded, np.nan)
    ax.plot(MARGINS, kept, color=colour(1), ls="none", marker=".", label="naive")
    lost = MARGINS[rounded == 0]
    if lost.size:
        text = "naive: 0"
        ax.axvspan(lost.min(), MARGINS[-1], color=colour(1), alpha=0.1, lw=0)
        ax.text((lost.min() + MARGINS[-1]) / 2, 3e-3, text, color=colour(1), ha="center")
    ax.set(yscale="log", xlim=(0, MARGINS[-1]), xlabel="margin of the right class over the other")
    names = {"loss": "loss (nats)", "gradient": "the label’s gradient entry, |p − 1|"}
    ax.set(ylabel=names[quantity], title=f"{jnp.dtype(dtype).name} logits")
    ax.legend(loc="lower left")
    return ax


def _sizes(logits: jax.Array) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns losses, and sizes of the first class's gradient entries, each (exact, naive)."""
    sizes = jax.tree.map(lambda x: np.abs(np.asarray(x, np.float64)), _exact_and_naive(logits))
    (exact, exact_slopes), (naive, naive_slopes) = sizes
    return {"loss": (exact, naive), "gradient": (exact_slopes, naive_slopes)}


@jax.jit
def _exact_and_naive(logits: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Returns (losses, the first class's gradient entries) of both formulas, for label 0."""

    def exact(z):
        return softmax_cross_entropy(z, jnp.zeros(z.shape[0], jnp.int32))

    def naive(z):
        return jax.nn.logsumexp(z, axis=-1) - z[:, 0]

    pairs = [jax.vjp(loss, logits) for loss in (exact, naive)]
    return [(y, pullback(jnp.ones_like(y))[0][:, 0]) for y, pullback in pairs]


def simplex(
    targets: Targets,
    *,
    classes: Sequence[str] | None = None,
    base: float | None = None,
    arrows: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draws the loss of every prediction over three classes, as a triangle.

    A corner is certainty of one class. Arrows lead where a small step of gradient descent on the
    logits moves the prediction: dp = (diag(p) − p pᵀ) (t − T · p).

    Args:
      targets: The target of one example: a label, dense float[3], or SparseTargets.
      classes: The names of the three classes; None numbers them from 0.
      base: The base of the logarithm: 2 gives bits; None is e, for nats.
      arrows: Whether to draw the arrows.
      ax: The axes to draw into; None takes pyplot's current ones.

    Returns:
      The axes; the colour bar has the unit of the loss.

    Raises:
      ValueError: targets are not those of one example of three classes.
      TypeError: arrows is no flag, or ax is no Axes.

    Example:
      >>> import xentjax
      >>> import matplotlib.pyplot as plt
      >>> import xentjax.plot
      >>> _, ax = plt.subplots()
      >>> ax = xentjax.plot.simplex(xentjax.smooth_labels(2, 0.1), classes=["a", "b", "c"], ax=ax)
      >>> [text.get_text() for text in ax.texts]
      ['a', 'b', 'c']
    """
    checks.check_flag("arrows", arrows)
    ax, names = axes(ax), names_of(classes, 3)
    p, targets = _simplex_points(SIMPLEX_STEPS), as_targets(targets)
    losses = np.asarray(_simplex_losses(p, targets)) / nats(base)
    levels = np.linspace(losses.min(), np.quantile(losses, 0.9), 16)
    x, y = (p @ CORNERS).T
    filled = ax.tricontourf(x, y, losses, levels=levels, extend="max")
    if arrows:
        tails = _simplex_points(SIMPLEX_ARROWS + 2)
        tails = tails[tails.min(-1) > 0.05]
        steps = np.asarray(_simplex_steps(tails, targets)) @ CORNERS
        steps *= 0.07 / np.maximum(np.linalg.norm(steps, axis=-1, keepdims=True), 1e-2)
        look = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.006}
        ax.quiver(*(tails @ CORNERS).T, *steps.T, color="white", **look)
    for name, (x, y), side in zip(names, CORNERS, ["right", "left", "center"], strict=True):
        ax.text(x, y + (0.03 if y else -0.03), name, ha=side, va="bottom" if y else "top")
    ax.set(xlim=(-0.12, 1.12), ylim=(-0.12, 1.0), aspect="equal", title="Loss of each prediction")
    ax.set_axis_off()
    ax.figure.colorbar(filled, ax=ax, label=f"loss ({unit(base)})", format="%.2g", shrink=0.8)
    return ax


def _simplex_points(steps: int) -> np.ndarray:
    """Returns distributions over three classes on a grid, float32[N, 3]."""
    i, j = np.meshgrid(np.arange(steps + 1), np.arange(steps + 1))
    grid = np.stack([i, j, steps - i - j], -1)[i + j <= steps] / steps
    return (SIMPLEX_EDGE + (1 - 3 * SIMPLEX_EDGE) * grid).astype(np.float32)


@jax.jit
def _simplex_losses(p: jax.Array, targets: jax.Array | SparseTargets) -> jax.Array:
    """Returns the loss of each prediction p [N, 3]."""
    return jax.vmap(lambda z: softmax_cross_entropy(z, targets))(jnp.log(p))


@jax.jit
def _simplex_steps(p: jax.Array, targets: jax.Array | SparseTargets) -> jax.Array:
    """Returns by how much a step against the gradient moves each prediction p [N, 3]."""

    def step(z):
        gradient = jax.grad(lambda z: softmax_cross_entropy(z, targets))(z)
        return jax.jvp(jax.nn.softmax, (z,), (-gradient,))[1]

    return jax.vmap(step)(jnp.log(p))


def loss_surface(
    loss: Callable[[Any], jax.typing.ArrayLike],
    center: Any,
    directions: tuple[Any, Any],
    *,
    radius: float = 1.0,
    steps: int = 41,
    ax: Axes | None = None,
) -> Axes:
    """Draws a loss around some parameters, over two directions.

    loss(center + a · directions[0] + b · directions[1]) for a and b in [−radius, radius]

    Args:
      loss: A function from parameters to a scalar, in nats.
      center: The parameters in the middle, an array or a pytree.
      directions: Two directions, each like the parameters.
      radius: The largest a and b.
      steps: Values of a, and of b.
      ax: The axes to draw into; None takes pyplot's current ones.

    Returns:
      The axes, with the loss as filled contours and the middle marked.

    Raises:
      TypeError: loss is no function, or ax is no Axes.
      ValueError: radius or steps is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> import matplotlib.pyplot as plt
      >>> import xentjax.plot
      >>> _, ax = plt.subplots()
      >>> x, y = jnp.array([[-2.0], [1.0], [3.0]]), jnp.array([0, 1, 1])
      >>> def loss(w):
      ...     logits = w[1] * x[:, 0] + w[0]
      ...     return xentjax.weighted_mean(xentjax.sigmoid_binary_cross_entropy(logits, y))
      >>> ax = xentjax.plot.loss_surface(loss, jnp.zeros(2), (jnp.eye(2)[0], jnp.eye(2)[1]), ax=ax)
      >>> ax.get_xlabel()
      'a: steps along the first direction'

    Source:
      Li et al., Visualizing the Loss Landscape of Neural Nets, 2018.
    """
    checks.check_callable("loss", loss)
    checks.check(radius > 0, f"radius: expected a positive number, got {radius!r}")
    checks.check(
        checks.is_int(steps) and steps > 1, f"steps: expected an int above 1, got {steps!r}"
    )
    ax, first, second = axes(ax), *directions
    grid = np.linspace(-radius, radius, steps, dtype=np.float32)

    def at(a, b):
        return loss(jax.tree.map(lambda c, u, v: c + a * u + b * v, center, first, second))

    losses = np.asarray(jax.jit(jax.vmap(jax.vmap(at, (0, None)), (None, 0)))(grid, grid))
    filled = ax.contourf(grid, grid, losses, levels=16)
    ax.contour(grid, grid, losses, levels=16, colors="white", linewidths=0.3)
    ax.plot(0, 0, "o", color=colour(1), mec="white")
    ax.set(xlabel="a: steps along the first direction", ylabel="b: steps along the second")
    ax.set(title="Loss around the parameters in the middle")
    ax.grid(visible=False)
    ax.figure.colorbar(filled, ax=ax, label="loss (nats)")
    return ax
