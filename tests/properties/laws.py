"""What is computed for a law: losses and derivatives of every target form, compiled once a backend.

A `Draw` is numbers for one batch. `evaluate(backend)(draw)` returns, for each form of targets, the
losses, their gradient and other derivatives. Others return the same of a batch in pieces: blocks of
the head, shards of the classes, microbatches. Shapes never change, so that nothing compiles anew.
"""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cases import jit
from heads import linear_loss
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from meshes import make_mesh, target_specs

import xentjax
from xentjax._softmax import passes
from xentjax._softmax.head_plan import HeadPlan

ROWS, CLASSES = 4, 6
FORMS = ("labels", "dense", "smoothed", "prior", "mixed", "weighted", "teacher", "two backgrounds")
BACKENDS = {
    "portable": {"FORCED": "portable"},
    "cpu": {"FORCED": "cpu"},
    "cpu in windows": {"FORCED": "cpu", "MAX_SUM": 4, "MAX_SUMS": 3, "MAX_KEPT_WIDE": 1},
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


# A batch in pieces.


@functools.cache
def head(form: str, plan: HeadPlan):
    """Returns (draw, inputs, kernel) -> losses and gradients of a head in blocks."""

    def both(draw, inputs, kernel):
        def losses_of(inputs, kernel):
            targets = targets_of(form, draw)
            return linear_loss(inputs, kernel, targets, reduction="none", plan=plan)

        losses, pull_back = jax.vjp(losses_of, inputs, kernel)
        return losses, *pull_back(draw.cotangents)

    return compiled(both, EXAMPLE, EXAMPLE.masses[:, :ROWS], EXAMPLE.logits)


PADDED = 8


@functools.cache
def split_by_class(form: str, devices: int):
    """Returns draw -> (losses, gradient) with the classes, two of them padding, on some devices."""
    mesh = make_mesh((1, devices), ("data", "model"))

    def padded(x):
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, PADDED - CLASSES)])

    def losses_of(logits, targets, where):
        return xentjax.vocab_parallel_softmax_cross_entropy(
            logits, targets, axis_name="model", where=where
        )

    def both(draw):
        targets = {
            "labels": lambda: draw.labels,
            "dense": lambda: padded(draw.masses),
            "prior": lambda: xentjax.smooth_labels(
                draw.labels, draw.share, background=padded(prior_of(draw))
            ),
        }[form]()
        of_classes = P("data", "model")
        on_mesh = jax.shard_map(
            losses_of,
            mesh=mesh,
            in_specs=(of_classes, target_specs(targets), of_classes),
            out_specs=P("data"),
        )
        where = padded(jnp.ones((ROWS, CLASSES), bool))
        losses, pull_back = jax.vjp(lambda z: on_mesh(z, targets, where), padded(draw.logits))
        return losses, pull_back(draw.cotangents)[0]

    return compiled(both, EXAMPLE)


@functools.cache
def split_by_example(form: str, devices: int, microbatches: int):
    """Returns (draw, weights) -> (mean, its gradient to a bias of the logits), in pieces."""

    def loss_fn(bias, batch):
        logits, targets, where, weights = batch
        logits = logits + jnp.broadcast_to(bias, logits.shape)
        losses = xentjax.softmax_cross_entropy(logits, targets, where=where)
        return xentjax.weighted_sum(losses, where=where, weights=weights)

    split = functools.partial(xentjax.accumulate_gradients, microbatches=microbatches)
    if devices > 1:
        mesh = make_mesh((devices,), ("data",))
        split = functools.partial(xentjax.data_parallel, mesh=mesh, microbatches=microbatches)

    def both(draw, weights):
        batch = draw.logits, targets_of(form, draw), draw.keep, weights
        return split(loss_fn)(jnp.zeros(CLASSES), batch)

    return compiled(both, EXAMPLE, EXAMPLE.cotangents)


@functools.cache
def information():
    """Returns (p, q) -> {function: (in nats, in bits)}."""
    functions = {
        "surprisal": lambda p, q, base: xentjax.surprisal(p, base=base),
        "entropy": lambda p, q, base: xentjax.entropy(p, base=base),
        "cross_entropy": lambda p, q, base: xentjax.cross_entropy(p, q, base=base),
        "kl_divergence": lambda p, q, base: xentjax.kl_divergence(p, q, base=base),
        "js_divergence": lambda p, q, base: xentjax.js_divergence(p, q, base=base),
    }

    def every(p, q):
        return {name: (f(p, q, None), f(p, q, 2)) for name, f in functions.items()}

    return compiled(every, EXAMPLE.logits, EXAMPLE.logits)


@functools.cache
def mixed_before_and_after():
    """Returns draw -> {function: its masses of mixed targets, the mixed masses of its targets}."""
    functions = {
        "smooth_labels": lambda t, d: xentjax.smooth_labels(t, d.share, background=prior_of(d)),
        "reweight_targets": lambda t, d: xentjax.reweight_targets(t, d.class_weights),
    }

    def both(function, draw):
        one, other = draw.labels, targets_of("teacher", draw)
        share = jnp.abs(draw.cotangents) / 2
        before = function(xentjax.mix_targets(one, other, share), draw)
        after = xentjax.mix_targets(function(one, draw), function(other, draw), share)
        return [xentjax.dense_targets(t, CLASSES) for t in (before, after)]

    return compiled(lambda d: {name: both(f, d) for name, f in functions.items()}, EXAMPLE)
