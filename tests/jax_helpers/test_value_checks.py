"""One switch checks the values of every public function, and costs nothing while it is off."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import jit
from checked import checked_in_scan, checked_loss
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P
from meshes import make_mesh

import xentjax as xj
from xentjax._jax import value_checks

NAN = np.nan
ROWS, CLASSES = 4, 3
Z = np.linspace(-1, 1, ROWS * CLASSES, dtype=np.float32).reshape(ROWS, CLASSES)
PROBABILITIES = np.asarray(jax.nn.softmax(Z))
LABELS = np.arange(ROWS, dtype=np.int32) % CLASSES
LOSSES = np.ones(ROWS, np.float32)
KERNEL, BIAS = Z[:3], Z[0]
SPARSE = (LABELS[:, None], np.ones((ROWS, 1), np.float32))
KEEP = np.arange(ROWS) != 1  # Row 1 is dropped.

NOT_NAN = "expected numbers( below inf)?, got nan"
NOT_NEGATIVE = "expected finite values of at least 0, got -0.5"
IN_RANGE = r"expected labels in \[0, 3\), got 7"


def spoiled(x, value, row=1):
    """Returns x with a bad value in one row."""
    x = x.copy()
    x[(row, 0)[: x.ndim]] = value
    return x


def sparse_of(indices, weights, mass=None, background=None):
    return xj.SparseTargets(
        indices, weights, mass, background, None if background is None else CLASSES
    )


# (function of an array, a good array, a bad value, the argument, the error, takes `where`).
CASES = {
    "labels": (
        lambda y, **o: xj.softmax_cross_entropy(Z, y, **o),
        *(LABELS, 7, "targets", IN_RANGE, True),
    ),
    "labels of stats": (
        lambda y, **o: xj.softmax_cross_entropy_with_stats(Z, y, **o)[0],
        *(LABELS, 7, "targets", IN_RANGE, True),
    ),
    "labels of the head": (
        lambda y, **o: xj.linear_softmax_cross_entropy(Z, KERNEL, y, **o),
        *(LABELS, 7, "targets", IN_RANGE, True),
    ),
    "logits": (
        lambda z, **o: xj.softmax_cross_entropy(z, LABELS, **o),
        *(Z, NAN, "logits", NOT_NAN, True),
    ),
    "infinite logits": (
        lambda z, **o: xj.softmax_cross_entropy(z, LABELS, **o),
        *(Z, np.inf, "logits", "expected numbers below inf, got inf", True),
    ),
    "logits of the entropy": (
        xj.softmax_entropy,
        *(Z, NAN, "logits", NOT_NAN, True),
    ),
    "logits of surprisals": (xj.softmax_surprisal, Z, NAN, "logits", NOT_NAN, False),
    "logits of a divergence": (
        lambda z, **o: xj.softmax_kl_divergence(Z, z, **o),
        *(Z, NAN, "q_logits", NOT_NAN, True),
    ),
    "logits of labels": (
        lambda z, **o: xj.multilabel_cross_entropy(z, PROBABILITIES, **o),
        *(Z, NAN, "logits", NOT_NAN, True),
    ),
    "inputs": (
        lambda x, **o: xj.linear_softmax_cross_entropy(x, KERNEL, LABELS, **o),
        *(Z, NAN, "inputs", NOT_NAN, True),
    ),
    "kernel": (
        lambda k: xj.linear_softmax_cross_entropy(Z, k, LABELS),
        *(KERNEL, NAN, "kernel", NOT_NAN, False),
    ),
    "bias": (
        lambda b: xj.linear_softmax_cross_entropy(Z, KERNEL, LABELS, bias=b[1]),
        *(Z, NAN, "bias", NOT_NAN, False),
    ),
    "weights of the head": (
        lambda w, **o: xj.linear_softmax_cross_entropy(Z, KERNEL, LABELS, weights=w, **o),
        *(LOSSES, -0.5, "weights", NOT_NEGATIVE, True),
    ),
    "dense": (
        lambda t, **o: xj.softmax_cross_entropy(Z, t, **o),
        *(PROBABILITIES, -0.5, "targets", NOT_NEGATIVE, True),
    ),
    "sparse": (
        lambda w, **o: xj.softmax_cross_entropy(Z, sparse_of(SPARSE[0], w), **o),
        *(SPARSE[1], -0.5, "targets.weights", NOT_NEGATIVE, True),
    ),
    "background mass": (
        lambda m, **o: xj.softmax_cross_entropy(Z, sparse_of(*SPARSE, m), **o),
        *(LOSSES, -0.5, "targets.background_mass", NOT_NEGATIVE, True),
    ),
    "background": (
        lambda b: xj.softmax_cross_entropy(Z, sparse_of(*SPARSE, LOSSES, b[1])),
        *(PROBABILITIES, -0.5, "targets.background", NOT_NEGATIVE, False),
    ),
    "background of smoothing": (
        lambda b: xj.smooth_labels(LABELS, 0.1, background=b[1]),
        *(PROBABILITIES, 0.9, "background", "expected probabilities that sum to 1", False),
    ),
    "class weights": (
        lambda w: xj.reweight_targets(LABELS, w[1]),
        *(PROBABILITIES, -0.5, "class_weights", NOT_NEGATIVE, False),
    ),
    "weights of a mean": (
        lambda w, **o: xj.weighted_mean(LOSSES, weights=w, **o),
        *(LOSSES, -0.5, "weights", NOT_NEGATIVE, True),
    ),
    "binary targets": (
        lambda t, **o: xj.multilabel_cross_entropy(Z, t, **o),
        *(PROBABILITIES, 1.5, "targets", r"expected values in \[0, 1\], got 1.5", True),
    ),
    "binary probabilities": (
        lambda p: xj.binary_cross_entropy(p, PROBABILITIES),
        *(PROBABILITIES, NAN, "probabilities", r"expected values in \[0, 1\], got nan", False),
    ),
    "surprisal": (
        xj.surprisal,
        *(PROBABILITIES, 1.5, "p", r"expected values in \[0, 1\], got 1.5", False),
    ),
    "entropy": (
        xj.entropy,
        *(PROBABILITIES, 0.9, "p", "expected probabilities that sum to 1", False),
    ),
    "divergence": (
        lambda q: xj.kl_divergence(PROBABILITIES, q),
        *(PROBABILITIES, 0.9, "q", "expected probabilities that sum to 1", False),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_value_is_named_unless_it_is_dropped(name):
    function, good, value, argument, message, takes_where = CASES[name]

    def outcome(x, where):
        with xj.value_checks():
            out = function(x, where=where) if takes_where else function(x)
        return jnp.stack([jnp.sum(leaf) for leaf in jax.tree.leaves(out)])

    run = jit(checkify.checkify(outcome))
    every, bad = np.ones(ROWS, bool), spoiled(good, value)
    assert run(good, every)[0].get() is None
    assert re.match(rf"{re.escape(argument)}: {message}", run(bad, every)[0].get())
    if takes_where:
        error, sums = run(bad, KEEP)
        assert error.get() is None
        assert np.isfinite(sums).all()
        assert re.match(rf"{re.escape(argument)}: {message}", run(bad, ~KEEP)[0].get())


def test_an_error_is_raised_at_once_where_there_are_values():
    bad = spoiled(Z, NAN)
    xj.softmax_cross_entropy(bad, LABELS)
    with xj.value_checks():
        message = r"^logits: expected numbers below inf, got nan at position \[1 0\]"
        with pytest.raises(ValueError, match=message):
            xj.softmax_cross_entropy(bad, LABELS)


def test_nothing_is_asked_of_values_while_the_switch_is_off(monkeypatch):
    """Programs are those of a library without checks, and no operation is added to trace."""

    def programs():
        texts = []
        for function, good, *_, takes_where in CASES.values():
            for options in ({}, {"where": jnp.asarray(KEEP)})[: 1 + takes_where]:
                call = functools.partial(function, **options)
                texts.append(str(jax.make_jaxpr(lambda x, call=call: call(x))(good)))
        return texts

    off = programs()
    for name in vars(value_checks):
        if name.startswith("check_"):
            monkeypatch.setattr(value_checks, name, lambda *args, **options: None)
    assert programs() == off
    monkeypatch.undo()
    with xj.value_checks():
        assert all(a != b for a, b in zip(programs(), off, strict=True))


@pytest.mark.parametrize(
    "transform",
    [jax.jit, jax.grad, jax.vmap, lambda f: checked_in_scan],
    ids=["jit", "grad", "vmap", "scan"],
)
def test_in_compiled_functions_checkify_has_the_error(transform):
    run = jit(checkify.checkify(transform(checked_loss)))
    for logits, targets, wanted in [
        (Z, PROBABILITIES, None),
        (
            spoiled(Z, NAN),
            PROBABILITIES,
            "logits: expected numbers below inf, got nan at position ",
        ),
        (
            Z,
            spoiled(PROBABILITIES, -0.5),
            "targets: expected finite values of at least 0, got -0.5",
        ),
    ]:
        error, _ = run(logits, targets)
        assert error.get() is None if wanted is None else error.get().startswith(wanted)


def test_on_many_devices():
    mesh = make_mesh((4,), ("data",))
    split = functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data"))

    @split
    def losses(logits, targets):
        with xj.value_checks():
            return xj.softmax_cross_entropy(logits, targets)

    run = jax.jit(checkify.checkify(losses))
    assert run(Z, LABELS)[0].get() is None
    assert "got nan at position [0 0]" in run(spoiled(Z, NAN, 2), LABELS)[0].get()
    with pytest.raises(ValueError, match=r"^value_checks of xentjax: expected checkify"):
        jax.jit(losses)(Z, LABELS)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_rounded_distributions_sum_to_1(dtype):
    z = np.random.default_rng(0).normal(size=(50, 1000)) * 3
    p = jnp.asarray(jax.nn.softmax(z.astype(np.float32)), dtype)

    def entropies(p):
        with xj.value_checks():
            return xj.entropy(p)

    run = jit(checkify.checkify(entropies))
    assert run(p)[0].get() is None
    error = run(p * jnp.asarray(1.03, dtype))[0].get()
    assert error.startswith("p: expected probabilities that sum to 1, got 1.0")


def test_scalars():
    with xj.value_checks():
        assert xj.surprisal(0.5) > 0
        with pytest.raises(ValueError, match=r"p: expected values in \[0, 1\], got 2.0 at posi"):
            xj.surprisal(2.0)


def test_the_switch_nests_and_ends_with_an_error():
    with contextlib.suppress(KeyError), xj.value_checks():
        with xj.value_checks():
            pass
        assert value_checks.are_on()
        raise KeyError
    assert not value_checks.are_on()
