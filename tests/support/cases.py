"""What the tests share: target forms, differentiation modes, and the plain formulas beside them."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import xentjax

mpmath.mp.dps = 50
INF = np.inf

# For small arrays compilation is most of the time: what it would gain them is not worth it.
_AS_IT_STANDS: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # Of JAX 0.12, XLA does not know it any more.
    _AS_IT_STANDS["xla_cpu_use_fusion_emitters"] = False
jit = functools.partial(jax.jit, compiler_options=_AS_IT_STANDS)


def mainly(cases, *chosen):
    """Returns all cases as parameters: `make test` takes the chosen ones, `make prove` the rest."""
    cases = list(cases)
    assert set(chosen) <= set(cases), set(chosen) - set(cases)
    return [c if c in chosen else pytest.param(c, marks=pytest.mark.prove) for c in cases]


class Forms(Mapping):
    """Targets by the name of their form, each made when it is asked for."""

    def __init__(self, makers):
        self._makers = makers

    def __getitem__(self, name):
        return self._makers[name]()

    def __iter__(self):
        return iter(self._makers)

    def __len__(self):
        return len(self._makers)


def target_forms(batch: int, num_classes: int, seed: int = 0) -> Forms:
    """Returns a target of every form, and of the forms that smoothing and mixing make."""
    rng = np.random.default_rng(seed)
    labels = jnp.asarray(rng.integers(0, num_classes, batch))
    prior = rng.dirichlet(np.ones(num_classes))

    def smoothed():
        return xentjax.smooth_labels(labels, np.asarray(0.1))  # In float64 where there is any.

    def with_prior():
        return xentjax.smooth_labels(labels, np.asarray(0.2), background=jnp.asarray(prior))

    def teacher():
        return xentjax.SparseTargets(
            jnp.asarray(rng.integers(0, num_classes, (batch, 7))),  # Classes repeat.
            jnp.asarray(rng.random((batch, 7))),
            jnp.asarray(rng.random(batch)),
        )

    def two_backgrounds():
        return xentjax.mix_targets(smoothed(), with_prior(), jnp.asarray(rng.random(batch)))

    def weighted():
        return xentjax.reweight_targets(smoothed(), jnp.asarray(rng.random(num_classes) + 0.5))

    return Forms(
        {
            "labels": lambda: labels,
            "dense": lambda: jnp.asarray(2 * rng.dirichlet(np.ones(num_classes), batch)),
            "smoothed": smoothed,
            "prior": with_prior,
            "mixed": lambda: xentjax.mix_targets(labels, labels[::-1], np.asarray(0.3)),
            "two backgrounds": two_backgrounds,
            "weighted": weighted,
            "teacher": teacher,
        }
    )


def plain_softmax_cross_entropy(logits, targets):
    """The formula as it is written, with dense targets and autodiff: an oracle in float64."""
    dense = xentjax.dense_targets(targets, logits.shape[-1])
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    return jnp.sum(dense * (log_normalizer[..., None] - logits), axis=-1)


def exact_softmax_cross_entropy(logits, masses):
    """Returns (loss, gradient to the logits) of one example at 50 digits."""
    z, t = ([mpmath.mpf(float(x)) for x in row] for row in (logits, masses))
    m, total = max(z), mpmath.fsum(t)
    exponentials = [mpmath.exp(x - m) for x in z]
    normalizer = mpmath.fsum(exponentials)
    lse = m + mpmath.log(normalizer)
    loss = mpmath.fsum(a * (lse - b) for a, b in zip(t, z, strict=True))
    return loss, [total * e / normalizer - a for e, a in zip(exponentials, t, strict=True)]


def relative_error(actual, exact) -> float:
    """Returns the largest |actual − exact| / |exact|, `exact` being mpmath numbers."""
    pairs = zip(np.ravel(actual), exact, strict=True)
    return float(max(abs(mpmath.mpf(float(a)) - e) / abs(e) for a, e in pairs))


@functools.partial(jax.jit, static_argnames="axis")
def loss_and_gradient(logits, targets, *, axis=-1, where=None):
    """Returns (losses, the gradient of their sum) of softmax_cross_entropy."""

    def loss(z):
        losses = xentjax.softmax_cross_entropy(z, targets, axis=axis, where=where)
        return losses.sum(), losses

    (_, losses), gradient = jax.value_and_grad(loss, has_aux=True)(logits)
    return losses, gradient


def rows_with_margins(num_classes, margins, seed=0):
    """Returns logits and labels, each `margin` above the largest of the other logits."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(margins), num_classes)) * 2
    labels = rng.integers(0, num_classes, len(margins))
    rows = np.arange(len(margins))
    logits[rows, labels] = -INF
    logits[rows, labels] = logits.max(-1) + margins
    return logits.astype(np.float32), labels


def contract(logits) -> float:
    """Returns the relative error that a loss or an entry of its gradient may have, in float32.

    It is eight ulps, 1e-6, or half an ulp of the largest m − z_v that is subtracted, where m is the
    largest logit: one rounding of it costs an exponential so much, which is 0 past 87.
    """
    z = np.asarray(logits, np.float64)
    gaps = z.max(-1, keepdims=True) - z
    return max(1e-6, 2.0**-24 * gaps[gaps <= 88].max())


def assert_exact(logits, labels):
    """Each loss and each entry of the gradient keeps the `contract` of its row."""
    losses, gradient = loss_and_gradient(logits, labels)
    one_hot = np.eye(logits.shape[-1])[labels]
    tiny = np.finfo(np.float32).tiny
    uncounted = len(one_hot[0]) * float(tiny)  # What smaller exponentials add up to at most.
    for row, z in enumerate(logits):
        loss, entries = exact_softmax_cross_entropy(z, one_hot[row])
        bound = contract(z)
        for actual, exact in zip([losses[row], *gradient[row]], [loss, *entries], strict=True):
            allowed = bound * abs(exact) + uncounted if abs(exact) >= tiny else tiny
            assert abs(mpmath.mpf(float(actual)) - exact) <= allowed


def floating_leaves(tree):
    """Returns (the floating leaves of `tree`, a function that puts others in their place)."""
    leaves, treedef = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def rebuild(floats):
        new = list(leaves)
        for i, leaf in zip(places, floats, strict=True):
            new[i] = leaf
        return jax.tree.unflatten(treedef, new)

    return [leaves[i] for i in places], rebuild


def _scanned(f):
    def through_scan(*args):
        def step(total, _):
            return total + f(*args), None

        return jax.lax.scan(step, jnp.zeros(()), None, length=2)[0] / 2

    return through_scan


def _each(f, args):
    return tuple(range(len(args)))


# Each mode maps (scalar function, arguments, tangents) to a pytree.
MODES = {
    "value": lambda f, a, t: f(*a),
    "grad": lambda f, a, t: jax.grad(f, _each(f, a))(*a),
    "jit(grad)": lambda f, a, t: jax.jit(jax.grad(f, _each(f, a)))(*a),
    "jvp": jax.jvp,
    "linearize": lambda f, a, t: jax.linearize(f, *a)[1](*t),
    "jacfwd": lambda f, a, t: jax.jacfwd(f, _each(f, a))(*a),
    "hessian": lambda f, a, t: jax.hessian(f, _each(f, a))(*a),
    "jacrev(jacrev)": lambda f, a, t: jax.jacrev(jax.jacrev(f, _each(f, a)), _each(f, a))(*a),
    "jacfwd(jacfwd)": lambda f, a, t: jax.jacfwd(jax.jacfwd(f, _each(f, a)), _each(f, a))(*a),
    "jacrev(jacfwd)": lambda f, a, t: jax.jacrev(jax.jacfwd(f, _each(f, a)), _each(f, a))(*a),
    "jvp(value_and_grad)": lambda f, a, t: jax.jvp(jax.value_and_grad(f, _each(f, a)), a, t),
    "grad(checkpoint)": lambda f, a, t: jax.grad(jax.checkpoint(f), _each(f, a))(*a),
    "grad(scan)": lambda f, a, t: jax.grad(_scanned(f), _each(f, a))(*a),
    "jacfwd(hessian)": lambda f, a, t: jax.jacfwd(jax.hessian(f))(*a),
}

# Modes that answer what another does: plain autodiff is asked once.
_SAME = {
    **dict.fromkeys(("jit(grad)", "jacfwd", "grad(checkpoint)", "grad(scan)"), "grad"),
    **dict.fromkeys(("jacrev(jacrev)", "jacfwd(jacfwd)", "jacrev(jacfwd)"), "hessian"),
}


def assert_modes_agree(modes, actual, desired, args):
    """Compares two scalar functions of float64 arguments, and their derivatives in some modes."""
    rng = np.random.default_rng(1)
    tangents = tuple(jnp.asarray(rng.normal(size=a.shape)) for a in args)

    @functools.partial(jit, static_argnums=(0, 1))
    def each_mode(function, names, args, tangents):
        return {name: MODES[name](function, args, tangents) for name in names}

    a = each_mode(actual, tuple(modes), args, tangents)
    d = each_mode(desired, tuple({_SAME.get(name, name): None for name in modes}), args, tangents)
    for name in modes:
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9, err_msg=name),
            a[name],
            d[_SAME.get(name, name)],
        )
