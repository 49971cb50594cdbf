"""Shapes of a loss against mpmath, to the third derivative, and against optax's own tests."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest
from cases import assert_modes_agree, jit

import xentjax

MP = mpmath.mp.clone()
MP.dps = 60

LOSSES = np.array([1e-30, 1e-10, 1e-4, 0.3, 0.999999, 1.0, 1.5, 10, 60], np.float32)
SHAPES = {
    "focal 2": (lambda x: xentjax.focal(x, 2.0), lambda x: (1 - MP.exp(-x)) ** 2 * x),
    "focal 1.5": (lambda x: xentjax.focal(x, 1.5), lambda x: (1 - MP.exp(-x)) ** MP.mpf(1.5) * x),
    "focal 0.5": (lambda x: xentjax.focal(x, 0.5), lambda x: (1 - MP.exp(-x)) ** MP.mpf(0.5) * x),
    "poly1": (lambda x: xentjax.poly1(x, 2.0), lambda x: x + 2 * (1 - MP.exp(-x))),
    "generalized 0.75": (
        lambda x: xentjax.generalized(x, 0.75),
        lambda x: (1 - MP.exp(-x * MP.mpf(0.75))) / MP.mpf(0.75),
    ),
    "generalized 0": (lambda x: xentjax.generalized(x, 0.0), lambda x: x),
}


def derivatives(shape, order):
    functions = [shape]
    for _ in range(order):
        functions.append(jax.grad(functions[-1]))
    return functions


@functools.cache
def of_all_shapes():
    """Returns {name: values and three derivatives at all losses}, compiled as one program."""

    @jit
    def every(losses):
        return {
            name: [jax.vmap(f)(losses) for f in derivatives(shape, 3)]
            for name, (shape, _) in SHAPES.items()
        }

    ends = np.array([0, 100, 1e4, 3e38, np.inf], np.float32)
    return jax.tree.map(np.asarray, every(np.concatenate([LOSSES, ends])))


@pytest.mark.parametrize("name", SHAPES)
def test_values_and_derivatives_are_exact(name):
    """A derivative of order n has a condition of its own: the tolerance is that of its terms."""
    for order, got in enumerate(of_all_shapes()[name]):
        for loss, actual in zip(LOSSES, got, strict=False):
            x = MP.mpf(float(loss))
            want = MP.diff(SHAPES[name][1], x, order, h=x * MP.mpf(10) ** -12)
            if MP.mpf("1e-36") < abs(want) < MP.mpf("1e38"):
                assert abs(MP.mpf(float(actual)) - want) <= MP.mpf("1e-6") * abs(want), (x, order)


@pytest.mark.parametrize("name", SHAPES)
def test_derivatives_are_finite_at_loss_0_and_at_large_losses(name):
    values, first, second, _ = (x[len(LOSSES) :] for x in of_all_shapes()[name])
    assert values[0] == 0
    if "generalized 0.75" in name:
        np.testing.assert_allclose(values[1:], 4 / 3, rtol=1e-6)
        np.testing.assert_allclose(first, [1, 0, 0, 0, 0], atol=1e-30)
    else:
        np.testing.assert_array_equal(
            values[2:], np.float32([1e4, 3e38, np.inf]) + 2 * ("poly" in name)
        )
        np.testing.assert_array_equal(first[1:], [1, 1, 1, 1])
        assert first[0] == {"poly1": 3, "generalized 0": 1}.get(name, 0)
    assert np.isfinite(second[1:]).all()
    assert np.isinf(second[0]) == (name == "focal 0.5")  # As the docstring says.


def test_gamma_0_and_epsilon_0_change_nothing():
    losses = np.float32([0, 1e-3, 5, np.inf])
    for shape in (xentjax.focal, xentjax.poly1):
        np.testing.assert_array_equal(shape(losses, 0.0), losses)
        np.testing.assert_array_equal(shape(losses, np.zeros(4, np.float32)), losses)
        second = jit(jax.vmap(derivatives(lambda x, shape=shape: shape(x, 0.0), 2)[2]))
        np.testing.assert_array_equal(second(losses), np.zeros(4))


@pytest.mark.parametrize("q", [0.0, 0.25, 1.0])
def test_slope_in_q_of_the_generalized_loss(q):
    """At q = 0 it is −loss² / 2, at an infinite loss −1 / q²."""
    losses = np.float32([0, 1e-3, 0.5, 4, 60, np.inf][: 6 if q else 5])
    slopes = jit(jax.vmap(jax.grad(xentjax.generalized, 1), (0, None)))(losses, q)

    def slope(x):
        if x == MP.inf:
            return -1 / MP.mpf(q) ** 2
        return MP.diff(lambda q: (1 - MP.exp(-x * q)) / q, q) if q else -(x**2) / 2

    wanted = [slope(MP.mpf(float(x))) for x in losses]
    np.testing.assert_allclose(slopes, np.array(wanted, float), rtol=3e-6)


def test_a_nan_stays_and_has_no_gradient_where_it_is_masked():
    losses, keep = np.float32([np.nan, 0.5]), np.array([False, True])
    for shape, _ in SHAPES.values():
        shaped, pull_back = jax.vjp(shape, losses)
        np.testing.assert_array_equal(np.isnan(shaped), ~keep)
        (gradient,) = pull_back(jnp.float32(keep))
        np.testing.assert_array_equal(gradient, [0, jax.grad(shape)(losses[1])])


def test_every_mode_after_a_softmax():
    """Beside the formulas in p, in float64, for one loss that has all shapes in it."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 3)

    def ours(z):
        losses = xentjax.softmax_cross_entropy(z, labels)
        shaped = xentjax.focal(losses, 1.5), xentjax.poly1(losses, 2.0)
        return sum(x.sum() for x in (*shaped, xentjax.generalized(losses, 0.7)))

    def plain(z):
        p = jnp.take_along_axis(jax.nn.softmax(z), labels[:, None], -1)[:, 0]
        focal, poly1 = -((1 - p) ** 1.5) * jnp.log(p), -jnp.log(p) + 2 * (1 - p)
        return (focal + poly1 + (1 - p**0.7) / 0.7).sum()

    modes = ["grad", "jvp", "grad(scan)", "jacrev(jacrev)", "jacfwd(jacfwd)"]
    with jax.enable_x64(True):
        assert_modes_agree(modes, ours, plain, (jnp.asarray(rng.normal(size=(3, 4))),))


def test_the_fused_head_and_the_sigmoid_take_shapes_too():
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=(5, 3)).astype("f"), rng.normal(size=(3, 7)).astype("f")
    labels = rng.integers(0, 7, 5)

    def head(x):
        losses = xentjax.linear_softmax_cross_entropy(x, kernel, labels, reduction="none")
        return xentjax.focal(losses, 2.0).sum()

    def logits(x):
        return xentjax.focal(xentjax.softmax_cross_entropy(x @ kernel, labels), 2.0).sum()

    for got, want in zip(*(jit(jax.value_and_grad(f))(x) for f in (head, logits)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


# optax's own tests of its losses, with ours in their place.


@pytest.mark.parametrize(
    ("epsilon", "expected"), [(2, 0.4823), (1, 0.3261), (0, 0.1698), (-0.5, 0.0917), (5.45, 1.0211)]
)
def test_poly1_of_a_label_as_optax_tests_it(epsilon, expected):
    losses = xentjax.softmax_cross_entropy(jnp.array([[4.0, 2.0, 1.0]]), jnp.array([0]))
    np.testing.assert_allclose(xentjax.poly1(losses, epsilon), [expected], atol=1e-4)


@pytest.mark.parametrize(
    ("epsilon", "expected"), [(2, 4.5317), (-1, 2.0827), (1.214, 3.8900), (5.45, 7.3480)]
)
def test_poly1_of_soft_targets_as_optax_tests_it(epsilon, expected):
    """By the README's recipe: the loss of a soft target does not tell the probabilities."""
    z, t = jnp.array([0.14, 1.456, 2.356, -0.124, -2.47]), jnp.array([0.1, 0.15, 0.2, 0.25, 0.3])
    loss = xentjax.softmax_cross_entropy(z, t) + epsilon * (t * (1 - jax.nn.softmax(z))).sum()
    np.testing.assert_allclose(loss, expected, atol=1e-4)


def test_focal_as_optax_tests_it():
    z = jnp.array([[2.0, 0.1, -2.0], [0.3, -0.1, 1.2]])
    t = jnp.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    losses = xentjax.sigmoid_binary_cross_entropy(z, t)
    p_t = jax.nn.sigmoid(z) * t + (1 - jax.nn.sigmoid(z)) * (1 - t)
    np.testing.assert_array_equal(xentjax.focal(losses, 0.0), losses)
    np.testing.assert_allclose(xentjax.focal(losses, 2) / losses, (1 - p_t) ** 2, rtol=2e-5)
    for gamma in (0.5, 2.0):
        weighted = jnp.where(t == 1, 0.25, 0.75) * xentjax.focal(losses, gamma)
        theirs = optax.losses.sigmoid_focal_loss(z, t, alpha=0.25, gamma=gamma)
        np.testing.assert_allclose(weighted, theirs, rtol=2e-5)
    extreme, labels = jnp.array([100.0, -100.0, 75.0, -75.0, 50.0, -50.0]), jnp.array([1, 0] * 3)

    def total(z):
        return xentjax.focal(xentjax.sigmoid_binary_cross_entropy(z, labels), 0.5).sum()

    assert np.isfinite(jax.grad(total)(extreme)).all()
    assert np.isfinite(jax.grad(total)(-extreme)).all()


def test_low_precision_is_computed_in_float32():
    losses = jnp.linspace(0, 9, 20, dtype=jnp.bfloat16)
    for shape in (xentjax.focal, xentjax.poly1, xentjax.generalized):
        got = shape(losses, 0.5)
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, shape(losses.astype(jnp.float32), 0.5))
