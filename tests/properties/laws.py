"""What is computed for a law: losses and derivatives of every target form, compiled once a backend.

A `Draw` is numbers for one batch. `evaluate(backend)(draw)` returns, for each form of targets, the
losses, their gradient and other derivatives. Shapes never change, so that nothing compiles anew.
"""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cases import jit
from hypothesis import strategies as st

import xentjax
from xentjax._softmax import passes

ROWS, CLASSES = 4, 6
FORMS = ("labels", "dense", "smoothed", "prior", "mixed", "weighted", "teacher", "two backgrounds")
BACKENDS = {
    "portable": {"FORCED": "portable"},
    "cpu": {"FORCED": "cpu"},
    "cpu in windows": {"FORCED": "cpu", "MAX_WHOLE_SUM": 1, "WINDOW": 4, "MAX_KEPT_WIDE": 1},
}


class Draw(NamedTuple):
    """Arrays of one batch: everything that targets, losses and derivatives are made of."""

    logits: Any  # [N, V]
    labels: Any  # [N]
    masses: Any  # [N, V], at least 0.
    share: Any  # In [0, 1].
    class_weights: Any  # [V]
    indices: Any  # [N, 3]
    weights: Any  # [N, 3]
    cotangents: Any  # [N]
    tangents: Any  # [N, V]
    keep: Any  # bool [N]


def make_draw(seed, spread, sparse):
    """Returns the batch of a seed; `sparse` makes most masses, weights and cotangents 0.

    Numbers are multiples of 1/16, so that shifts by whole numbers are exact, and ties are many.
    """
    rng = np.random.default_rng(seed)

    def floats(low, high, *shape):
        numbers = rng.integers(low * 16, high * 16, shape, endpoint=True) / 16
        return (numbers * (rng.random(shape) < 0.3) if sparse else numbers).astype(np.float32)

    def classes(*shape):
        return rng.integers(0, CLASSES, shape, dtype=np.int32)

    logits = rng.integers(-spread * 16, spread * 16, (ROWS, CLASSES), endpoint=True) / 16
    return Draw(
        logits=logits.astype(np.float32),
        labels=classes(ROWS),
        masses=floats(0, 2, ROWS, CLASSES),
        share=np.float32(rng.integers(0, 16, endpoint=True) / 16),
        class_weights=floats(0, 4, CLASSES),
        indices=classes(ROWS, 3),
        weights=floats(0, 2, ROWS, 3),
        cotangents=floats(-2, 2, ROWS),
        tangents=floats(-2, 2, ROWS, CLASSES),
        keep=rng.random(ROWS) < 0.5,
    )


draws = st.builds(
    make_draw, st.integers(0, 2**32 - 1), st.sampled_from((0, 1, 4, 12, 40)), st.booleans()
)


def prior_of(draw):
    """Returns a distribution over classes; no class is impossible."""
    weights = draw.class_weights + jnp.float32(0.125)
    return weights / weights.sum()


def targets_of(form: str, draw: Draw) -> Any:
    """Returns the targets of a form."""
    labels, share = draw.labels, draw.share
    smoothed = functools.partial(xentjax.smooth_labels, labels, share)
    makers = {
        "labels": lambda: labels,
        "dense": lambda: draw.masses,
        "smoothed": smoothed,
        "prior": lambda: smoothed(background=prior_of(draw)),
        "mixed": lambda: xentjax.mix_targets(labels, labels[::-1], share),
        "weighted": lambda: xentjax.reweight_targets(smoothed(), draw.class_weights),
        "teacher": lambda: xentjax.SparseTargets(draw.indices, draw.weights, draw.masses[:, 0]),
        "two backgrounds": lambda: xentjax.mix_targets(
            smoothed(), smoothed(background=prior_of(draw)), share
        ),
    }
    return makers[form]()


class Answer(NamedTuple):
    """What is known of a batch under one form of targets."""

    masses: Any  # [N, V]
    losses: Any  # [N]
    value: Any  # [N], the losses where nothing is differentiated.
    gradient: Any  # [N, V], of Σ cotangent · loss.
    slopes: Any  # [N], the losses' derivative along the tangents.
    log_normalizer: Any  # [N]
    entropy: Any  # [N]


def answer(form: str, draw: Draw, where: Any = None) -> Answer:
    """Returns the Answer of one form."""
    targets = targets_of(form, draw)

    def losses_of(logits):
        return xentjax.softmax_cross_entropy(logits, targets, where=where)

    losses, pull_back = jax.vjp(losses_of, draw.logits)
    _, slopes = jax.jvp(losses_of, (draw.logits,), (draw.tangents,))
    _, stats = xentjax.softmax_cross_entropy_with_stats(draw.logits, targets, where=where)
    return Answer(
        xentjax.dense_targets(targets, CLASSES),
        losses,
        losses_of(draw.logits),
        pull_back(draw.cotangents)[0],
        slopes,
        stats.log_normalizer,
        stats.entropy,
    )


@contextlib.contextmanager
def backend(name):
    """Chooses the code that logits of these small sizes take."""
    old = {key: getattr(passes, key) for key in BACKENDS[name]}
    try:
        for key, value in BACKENDS[name].items():
            setattr(passes, key, value)
        yield
    finally:
        for key, value in old.items():
            setattr(passes, key, value)


EXAMPLE = make_draw(0, 4, sparse=False)


def compiled(function, *examples, backend_name="portable"):
    """Returns a function that is compiled now, by one backend, and answers in float64 of NumPy."""

    def fresh(*args):
        return function(*args)

    with backend(backend_name):
        program = jit(fresh).lower(*examples).compile()

    def wide(x):
        return np.asarray(x, np.float64) if x.dtype.kind == "f" else np.asarray(x)

    return lambda *args: jax.tree.map(wide, jax.tree.map(np.asarray, program(*args)))


@functools.cache
def evaluate(backend_name: str, masked: bool = False):
    """Returns Draw -> {form: Answer}; masked drops the examples that the draw does not keep."""
    forms = ("labels", "dense", "two backgrounds") if masked else FORMS

    def every(draw):
        return {f: answer(f, draw, draw.keep if masked else None) for f in forms}

    return compiled(every, EXAMPLE, backend_name=backend_name)
