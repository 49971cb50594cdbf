"""Surprisal as a curve, entropy and cross-entropy as areas."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import ArrayLike
from matplotlib.axes import Axes

from xentjax._jax import checks
from xentjax._losses.information import cross_entropy, surprisal
from xentjax.plot._axes import axes, colour, names_of, unit

NUM_POINTS = 400
LEAST = 8e-4  # The smallest probability of the curve.


def surprisal_curve(
    outcomes: Mapping[str, float] | None = None,
    *,
    base: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the surprisal of an outcome by its probability.

    s(p) = −log p

    Args:
      outcomes: Probabilities to mark on the curve, by their names.
      base: The base of the logarithm: 2 gives bits; None is e, for nats.
      ax: The axes to draw into; None takes pyplot's current ones.

    Returns:
      The axes.

    Raises:
      ValueError: A probability is not in (0, 1], or base is not a positive number other than 1.
      TypeError: ax is no Axes.

    Example:
      >>> import matplotlib.pyplot as plt
      >>> import xentjax.plot
      >>> _, ax = plt.subplots()
      >>> ax = xentjax.plot.surprisal_curve({"panda": 0.001, "fair coin": 0.5}, base=2, ax=ax)
      >>> ax.get_ylabel()
      'surprisal (bits)'

    Source:
      Shannon, A Mathematical Theory of Communication, 1948, section 6.
    """
    ax, outcomes = axes(ax), dict(outcomes or {})
    for name, p in outcomes.items():
        expected = f"outcomes: expected probabilities in (0, 1], got {p!r} for {name!r}"
        checks.check(0 < p <= 1, expected)
    least = min([LEAST, *outcomes.values()])
    p = np.geomspace(least, 1, NUM_POINTS, dtype=np.float32)
    ax.plot(p, surprisal(p, base=base), color=colour(0))
    top = float(surprisal(least, base=base))
    for name, x in outcomes.items():
        y = float(surprisal(x, base=base))
        ax.plot(x, y, "o", color=colour(1), clip_on=False)
        side = "left" if x < 0.8 else "right"
        shift = (9, -4) if y > 0.5 * top else (0, 9)
        text = f"{name}, p = {x:g}"
        ax.annotate(text, (x, y), shift, textcoords="offset points", ha=side)
    ax.set(xlim=(-0.02, 1), ylim=(0, 1.05 * top), title="s(p) = −log p")
    ax.set(xlabel="probability of the outcome, p", ylabel=f"surprisal ({unit(base)})")
    return ax


def cross_entropy_areas(
    truth: ArrayLike,
    prediction: ArrayLike | None = None,
    *,
    classes: Sequence[str] | None = None,
    base: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws a bar for each class, whose areas add to the cross-entropy, or to the entropy.

    A bar is as wide as the true probability of its class, and as high as the surprisal that the
    prediction gives it: H(p, q) = Σ_v p_v · (−log q_v).

    Args:
      truth: p, probabilities of the classes, float[V].
      prediction: q, float[V]; None is the truth, whose areas add to the entropy H(p).
      classes: The names of the V classes; None numbers them from 0.
      base: The base of the logarithm: 2 gives bits; None is e, for nats.
      ax: The axes to draw into; None takes pyplot's current ones.

    Returns:
      The axes, with the sum of the areas in the title.

    Raises:
      ValueError: The shapes do not fit, or base is not a positive number other than 1.
      TypeError: Probabilities are not floating-point, or ax is no Axes.

    Example:
      >>> import jax.numpy as jnp
      >>> import matplotlib.pyplot as plt
      >>> import xentjax.plot
      >>> _, ax = plt.subplots()
      >>> truth, guess = jnp.array([0.2, 0.3, 0.5]), jnp.array([0.1, 0.2, 0.7])
      >>> xentjax.plot.cross_entropy_areas(truth, guess, ax=ax).get_title()
      'cross-entropy = area = 1.1217 nats'

    Source:
      Shannon, A Mathematical Theory of Communication, 1948, section 6.
    """
    ax, p = axes(ax), checks.as_array("truth", truth)
    checks.check(p.ndim == 1, f"truth: expected shape [V], got {checks.describe(p)}")
    q = p if prediction is None else checks.as_array("prediction", prediction)
    area = cross_entropy(p, q, base=base)
    heights, widths = np.asarray(surprisal(q, base=base)), np.asarray(p)
    names, left = names_of(classes, p.shape[0]), np.concatenate([[0], np.cumsum(widths)[:-1]])
    top = 1.35 * float(heights[np.isfinite(heights) & (widths > 0)].max(initial=0.1))
    symbol = "p" if prediction is None else "q"
    for v, name in enumerate(names):
        height = min(float(heights[v]), top)
        ax.bar(left[v], height, widths[v], align="edge", color=colour(v), edgecolor="white")
        if widths[v] > 0.04:  # A label is about so wide.
            text = f"{name}\n{symbol} = {float(q[v]):.2g}"
            x, y = left[v] + widths[v] / 2, min(height, 0.82 * top)
            ax.text(x, y, text, ha="center", va="bottom", fontsize="small")
    kind = "entropy" if prediction is None else "cross-entropy"
    ax.set(xlim=(0, 1), ylim=(0, top), xlabel="true probability p, as widths")
    ax.set(ylabel=f"surprisal of the prediction ({unit(base)})")
    ax.set_title(f"{kind} = area = {float(area):.4f} {unit(base)}")
    ax.grid(visible=False)
    return ax
