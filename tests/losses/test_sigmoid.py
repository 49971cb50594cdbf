"""Binary and multi-label cross-entropy: exact, in every differentiation mode, to both arguments."""

import functools
import itertools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest
from cases import jit, mainly
from jax.test_util import check_grads

import xentjax

MP = mpmath.mp.clone()
MP.dps = 50

ULPS = 8
MARGINS = np.concatenate([np.linspace(-80, 80, 161), [1e-3, -1e-3, 1e-7, -1e-7, 16.6, -16.6, -0.0]])
SOFT = [1e-30, 1e-10, 0.0, 1.0, 0.5, 0.1, 1 - 1e-6]


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield np.dtype(request.param)


def exact(x):
    return MP.mpf(float(x))


def exact_sigmoid(z):
    return 1 / (1 + MP.exp(-z))


def loss_and_slopes(z, t):
    """Returns Σ of two terms, each not negative, and the same for the gradient, at 50 digits."""
    z, t = exact(z), exact(t)
    terms = t * MP.log1p(MP.exp(-z)), (1 - t) * MP.log1p(MP.exp(z))
    return sum(terms), (1 - t) * exact_sigmoid(z), t * exact_sigmoid(-z)


@pytest.mark.parametrize("t", SOFT)
def test_loss_and_gradient_are_exact(t, dtype):
    z = MARGINS.astype(dtype)
    t = np.full_like(z, t)
    losses = np.asarray(xentjax.sigmoid_binary_cross_entropy(z, t))
    grad = jax.grad(lambda z, t: xentjax.sigmoid_binary_cross_entropy(z, t).sum(), (0, 1))
    to_z, to_t = map(np.asarray, grad(z, t))
    assert losses.dtype == to_z.dtype == to_t.dtype == dtype
    tolerance = ULPS * float(np.finfo(dtype).eps)
    for i in range(len(z)):
        loss, up, down = loss_and_slopes(z[i], t[i])
        assert abs(exact(losses[i]) - loss) <= tolerance * loss, (z[i], losses[i])
        # The two slopes of a soft target cancel, so the error is beside their sum.
        assert abs(exact(to_z[i]) - (up - down)) <= tolerance * (up + down), (z[i], to_z[i])
    np.testing.assert_array_equal(to_t, -z)


def second_derivative(z, t):
    slope = jax.grad(xentjax.sigmoid_binary_cross_entropy)
    return jax.vmap(jax.grad(slope))(z, t)


@pytest.mark.parametrize("t", SOFT)
def test_second_derivative_is_exact(t, dtype):
    """σ(z) · σ(−z), whatever the target."""
    z = MARGINS.astype(dtype)
    got = np.asarray(jax.jit(second_derivative)(z, np.full_like(z, t)))
    want = [float(exact_sigmoid(exact(x)) * exact_sigmoid(-exact(x))) for x in z]
    info = np.finfo(dtype)  # What is smaller than `tiny` may be flushed to 0.
    np.testing.assert_allclose(got, want, rtol=ULPS * float(info.eps), atol=float(info.tiny))


def test_second_derivative_beyond_the_range_of_exp():
    z = np.array([-3e38, -1e4, -100, -90, 90, 100, 1e4, 3e38, -np.inf, np.inf], np.float32)
    for t in (0.0, 0.25, 1.0):
        got = np.asarray(jax.jit(second_derivative)(z, np.full_like(z, t)))
        np.testing.assert_allclose(got, 0, atol=1e-37)


def test_certainty():
    """Logits ±inf: 0 where the target agrees, +inf where it does not, and never NaN."""
    inf = np.inf
    z = np.array([inf, -inf, inf, -inf, inf, -inf, 3e38, -3e38], np.float32)
    t = np.array([1, 0, 0, 1, 0.5, 0.5, 0, 1], np.float32)
    losses, to_z = jax.vmap(jax.value_and_grad(xentjax.sigmoid_binary_cross_entropy))(z, t)
    np.testing.assert_array_equal(
        losses, np.array([0, 0, inf, inf, inf, inf, 3e38, 3e38], np.float32)
    )
    np.testing.assert_array_equal(to_z, [0, 0, 1, -1, 0.5, -0.5, 1, -1])
    sums = xentjax.multilabel_cross_entropy(z[:2], t[:2])
    assert sums == 0


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("jit", [False, True])
def test_no_cotangent_has_no_gradient_however_certain_the_logit(t, jit):
    z = np.array([np.inf, -np.inf, 3e38, 2.0], np.float32)

    def weighted(z, t, weights):
        return (weights * xentjax.sigmoid_binary_cross_entropy(z, t)).sum()

    def gradients(z, t, weights):
        _, pull_back = jax.vjp(xentjax.sigmoid_binary_cross_entropy, z, t)
        return pull_back(weights)

    to_z, to_t = (jax.jit(gradients) if jit else gradients)(z, np.full_like(z, t), np.zeros(4, "f"))
    np.testing.assert_array_equal([to_z, to_t], np.zeros((2, 4)))
    _, to_t = gradients(z, np.full_like(z, t), np.ones(4, "f"))
    np.testing.assert_array_equal(to_t, -z)
    second = jax.hessian(weighted, (0, 1))(z, np.full_like(z, t), np.ones(4, "f"))
    sigma = 1 / (1 + np.exp(-2.0))
    np.testing.assert_allclose(second[0][0], np.diag([0, 0, 0, sigma * (1 - sigma)]), rtol=1e-6)


@pytest.mark.parametrize("of_targets", [bool, np.int32, np.uint8, np.float16, np.float32])
def test_targets_of_any_dtype(of_targets):
    z, t = np.array([2.0, -3.0, 0.5], np.float32), np.array([1, 0, 1])
    want = xentjax.sigmoid_binary_cross_entropy(z, t.astype(np.float32))
    np.testing.assert_array_equal(
        xentjax.sigmoid_binary_cross_entropy(z, t.astype(of_targets)), want
    )
    p = np.array([0.9, 0.1, 1.0], np.float32)
    np.testing.assert_array_equal(
        xentjax.binary_cross_entropy(p, t.astype(of_targets)),
        xentjax.binary_cross_entropy(p, t.astype(np.float32)),
    )


@pytest.mark.parametrize("low", mainly([jnp.bfloat16, jnp.float16], jnp.bfloat16))
def test_low_precision_is_read_as_it_is_and_computed_in_float32(low):
    """As the formula written down and run in that dtype is not: its error reaches 100 %."""
    z = jnp.linspace(-9, 9, 101, dtype=jnp.float32).astype(low)
    t = jnp.ones(z.shape, low)
    ours = jax.vmap(jax.value_and_grad(xentjax.sigmoid_binary_cross_entropy))(z, t)
    naive = jax.vmap(jax.value_and_grad(lambda z, t: -t * jnp.log(jax.nn.sigmoid(z))))(z, t)
    assert [x.dtype for x in ours] == [jnp.float32, low]
    losses, _, slopes = map(np.array, zip(*map(loss_and_slopes, z, t), strict=True))
    half_ulp = float(jnp.finfo(low).eps) / 2  # The gradient is rounded to the input's dtype.
    truths, tolerances = (losses, -slopes), (1e-6, half_ulp * (1 + 1e-3))
    for got, bad, truth, tolerance in zip(ours, naive, truths, tolerances, strict=True):
        np.testing.assert_allclose(np.asarray(got, float), truth.astype(float), rtol=tolerance)
        assert np.max(np.abs(np.asarray(bad, float) / truth.astype(float) - 1)) > 0.9


# Every differentiation mode, of each loss, to each argument. Each returns the two diagonals.


def diagonals(jacobians):
    return tuple(jnp.diagonal(j) for j in jacobians)


def by_jvp(push):
    """Derivatives of an elementwise function: push a tangent of ones through one argument."""

    def modes(f):
        def derivatives(z, t):
            ones, zeros = jnp.ones_like(z), jnp.zeros_like(z)
            return push(f, (z, t), (ones, zeros)), push(f, (z, t), (zeros, ones))

        return derivatives

    return modes


def summed(f):
    return lambda z, t: f(z, t).sum()


def scanned(f):
    """The sum again, one element a step."""

    def total(z, t):
        return jax.lax.scan(lambda s, zt: (s + f(*zt), None), jnp.zeros(()), (z, t))[0]

    return total


MODES = {
    "grad": lambda f: jax.grad(summed(f), (0, 1)),
    "grad of vmap": lambda f: jax.grad(summed(jax.vmap(f)), (0, 1)),
    "vmap of grad": lambda f: jax.vmap(jax.grad(f, (0, 1))),
    "jvp": by_jvp(lambda f, x, dx: jax.jvp(f, x, dx)[1]),
    "linearize": by_jvp(lambda f, x, dx: jax.linearize(f, *x)[1](*dx)),
    "jacfwd": lambda f: lambda *x: diagonals(jax.jacfwd(f, (0, 1))(*x)),
    "jacrev": lambda f: lambda *x: diagonals(jax.jacrev(f, (0, 1))(*x)),
    "grad of checkpoint": lambda f: jax.grad(summed(jax.checkpoint(f)), (0, 1)),
    "grad of scan": lambda f: jax.grad(scanned(f), (0, 1)),
    "checkpoint in scan": lambda f: jax.grad(scanned(jax.checkpoint(f)), (0, 1)),
}

SECOND = {
    "hessian": lambda f: jax.hessian(f, (0, 1)),
    "jacrev of jacrev": lambda f: jax.jacrev(jax.jacrev(f, (0, 1)), (0, 1)),
    "jacfwd of jacfwd": lambda f: jax.jacfwd(jax.jacfwd(f, (0, 1)), (0, 1)),
    "jacrev of jacfwd": lambda f: jax.jacrev(jax.jacfwd(f, (0, 1)), (0, 1)),
}

LOGITS = np.array([-60.0, -2.0, 0.0, 0.5, 17.0, 60.0])
PROBABILITIES = np.array([1e-9, 0.25, 0.5, 0.6, 0.99, 1 - 2**-20])
SOME = np.array([0.0, 0.3, 1.0, 0.5, 1.0, 0.9])


def from_logits(z, t):
    """Derivatives to z, t, zz, zt and tt in float64."""
    up, down = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))
    return (1 - t) * up - t * down, -z, up * down, -np.ones_like(z), np.zeros_like(z)


def from_probabilities(p, t):
    no = 1 - p
    return (
        (1 - t) / no - t / p,
        np.log1p(-p) - np.log(p),
        t / p**2 + (1 - t) / no**2,
        -1 / p - 1 / no,
        np.zeros_like(p),
    )


LOSSES = {
    "sigmoid_binary_cross_entropy": (
        xentjax.sigmoid_binary_cross_entropy,
        from_logits(LOGITS, SOME),
        LOGITS,
    ),
    # One label an example, so that the sum over labels is elementwise too.
    "multilabel_cross_entropy": (
        lambda z, t: xentjax.multilabel_cross_entropy(z[..., None], t[..., None]),
        from_logits(LOGITS, SOME),
        LOGITS,
    ),
    "binary_cross_entropy": (
        xentjax.binary_cross_entropy,
        from_probabilities(PROBABILITIES, SOME),
        PROBABILITIES,
    ),
}


@pytest.mark.parametrize(
    "case",
    mainly(
        itertools.product(LOSSES, MODES),
        *(("sigmoid_binary_cross_entropy", mode) for mode in MODES),
        *((name, mode) for name in LOSSES for mode in ("grad", "jacfwd")),
    ),
    ids=str,
)
def test_first_derivatives_in_every_mode(case):
    name, mode = case
    loss, (to_z, to_t, *_), z = LOSSES[name]
    with jax.enable_x64(True):
        got = jit(MODES[mode](loss))(z, SOME)
        np.testing.assert_allclose(got[0], to_z, rtol=1e-14, atol=1e-17)
        np.testing.assert_allclose(got[1], to_t, rtol=1e-14, atol=1e-17)


@pytest.mark.parametrize("mode", SECOND)
@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives_in_every_mode(name, mode):
    loss, (_, _, zz, zt, tt), z = LOSSES[name]
    with jax.enable_x64(True):
        got = jit(SECOND[mode](summed(loss)))(z, SOME)
        for i, j, want in [(0, 0, zz), (0, 1, zt), (1, 0, zt), (1, 1, tt)]:
            np.testing.assert_allclose(got[i][j], np.diag(want), rtol=1e-13, atol=1e-30)


LOOPS = {
    "map": lambda f, xs: jax.lax.map(lambda x: f(*x), xs).sum(),
    "scan": lambda f, xs: jax.lax.scan(lambda s, x: (s + f(*x), None), jnp.zeros(()), xs)[0],
}


@pytest.mark.parametrize(
    "case",
    mainly(
        itertools.product(("sigmoid_binary_cross_entropy", "binary_cross_entropy"), SECOND, LOOPS),
        *(("sigmoid_binary_cross_entropy", mode, "scan") for mode in SECOND),
        ("binary_cross_entropy", "hessian", "map"),
    ),
    ids=str,
)
def test_second_derivatives_in_a_loop(case):
    """JAX 0.10 drops a `jax.custom_jvp` rule in a loop that is differentiated twice."""
    name, mode, loop = case
    loss, (_, _, zz, zt, tt), z = LOSSES[name]
    with jax.enable_x64(True):

        def total(z, t):
            return LOOPS[loop](loss, (z, t))

        got = jit(SECOND[mode](total))(z, SOME)
        for i, j, want in [(0, 0, zz), (0, 1, zt), (1, 0, zt), (1, 1, tt)]:
            np.testing.assert_allclose(got[i][j], np.diag(want), rtol=1e-13, atol=1e-30)


def test_second_derivative_of_small_probabilities():
    """t / p², where p² is no float32."""
    p, t = np.float32(1e-20), np.float32(1e-20)
    for mode in (jax.hessian, lambda f: jax.jacrev(jax.jacrev(f))):
        got = jax.jit(mode(lambda p: xentjax.binary_cross_entropy(p, t)))(p)
        np.testing.assert_allclose(got, float(t) / float(p) ** 2, rtol=1e-6)


def test_hessian_vector_product():
    v = np.arange(1.0, 7.0)
    grad = jax.grad(summed(xentjax.sigmoid_binary_cross_entropy))
    with jax.enable_x64(True):
        _, got = jax.jvp(lambda z: grad(z, SOME), (LOGITS,), (v,))
        np.testing.assert_allclose(got, from_logits(LOGITS, SOME)[2] * v, rtol=1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_first_derivatives_without_jit(mode):
    z, t = LOGITS.astype(np.float32), SOME.astype(np.float32)
    got = MODES[mode](xentjax.sigmoid_binary_cross_entropy)(z, t)
    to_z, to_t, *_ = from_logits(z.astype(float), t.astype(float))
    np.testing.assert_allclose(got[0], to_z, rtol=1e-6)
    np.testing.assert_allclose(got[1], to_t, rtol=1e-6)


@pytest.mark.prove
@pytest.mark.parametrize("name", ["sigmoid_binary_cross_entropy", "binary_cross_entropy"])
def test_numerical_derivatives(name):
    loss, _, _ = LOSSES[name]
    with jax.enable_x64(True):
        check_grads(loss, (PROBABILITIES[1:4], SOME[1:4]), order=2, modes=["fwd", "rev"])


# Losses of probabilities.


def test_binary_cross_entropy_is_exact():
    """Whatever p is as a float32: near 0, and where 1 − p is 2⁻²⁴."""
    near_0, ulps = np.geomspace(1e-37, 0.5, 60), 2.0 ** -np.arange(1, 25)
    p = np.concatenate([near_0, ulps, 1 - ulps, [0.0, 1.0]]).astype(np.float32)
    for t in (0.0, 1.0, 0.3):
        got = np.asarray(xentjax.binary_cross_entropy(p, np.full_like(p, t)))
        for x, loss in zip(p, got, strict=True):
            yes, no = exact(np.float32(t)), 1 - exact(np.float32(t))
            terms = [(yes, exact(x)), (no, 1 - exact(x))]
            want = sum(-w * MP.log(q) if q else MP.inf for w, q in terms if w)
            assert loss == want or abs(exact(loss) - want) <= 1e-6 * want, (x, t, loss)


def test_binary_cross_entropy_at_0_and_1():
    p, t = np.array([0.0, 1.0, 0.0, 1.0], np.float32), np.array([0.0, 1.0, 1.0, 0.0], np.float32)
    grad = jax.vmap(jax.value_and_grad(xentjax.binary_cross_entropy, (0, 1)))
    losses, (to_p, to_t) = grad(p, t)
    np.testing.assert_array_equal(losses, [0, 0, np.inf, np.inf])
    np.testing.assert_array_equal(to_p, [1, -1, -np.inf, np.inf])
    assert np.isfinite(to_t[:2]).all()


def test_binary_is_softmax_of_two_classes():
    z, t = LOGITS.astype(np.float32), SOME.astype(np.float32)
    pair = np.stack([np.zeros_like(z), z], axis=-1)
    both = xentjax.softmax_cross_entropy(pair, np.stack([1 - t, t], axis=-1))
    np.testing.assert_allclose(xentjax.sigmoid_binary_cross_entropy(z, t), both, rtol=1e-6)


# Masks.


@pytest.mark.parametrize("junk", mainly([np.nan, np.inf, -np.inf, 255.0], np.nan, -np.inf, 255.0))
@pytest.mark.parametrize("name", LOSSES)
def test_masked_elements_have_loss_and_gradient_0(name, junk):
    loss = getattr(xentjax, name)
    rng = np.random.default_rng(4)
    z, t = rng.random((2, 3, 4)).astype(np.float32)
    keep = rng.random(z.shape) < 0.6
    bad_z, bad_t = np.where(keep, z, junk).astype("f"), np.where(keep, t, junk).astype("f")

    def total(z, t, where):
        return loss(z, t, where=where).sum()

    got = jax.jit(jax.value_and_grad(total, (0, 1)))(bad_z, bad_t, keep)
    each = getattr(xentjax, name.replace("multilabel", "sigmoid_binary"))
    value, gradients = jax.value_and_grad(lambda *x: each(*x)[keep].sum(), (0, 1))(z, t)
    np.testing.assert_allclose(got[0], value, rtol=1e-6)
    for a, b in zip(got[1], gradients, strict=True):
        np.testing.assert_allclose(a, np.where(keep, b, 0), rtol=1e-6)


def test_multilabel_mask_of_examples():
    z = np.array([[1.0, -2.0], [np.nan, np.inf]], np.float32)
    keep = np.array([True, False])
    losses, pull_back = jax.vjp(
        lambda z: xentjax.multilabel_cross_entropy(z, np.ones((2, 2)), where=keep), z
    )
    np.testing.assert_allclose(losses, [np.log1p(np.exp([-1.0, 2.0])).sum(), 0], rtol=1e-6)
    np.testing.assert_array_equal(pull_back(jnp.ones(2))[0][1], [0, 0])
    across = xentjax.multilabel_cross_entropy(z.T, np.ones((2, 2)), axis=0, where=keep)
    np.testing.assert_array_equal(across, losses)


# The debug switch for labels.


@pytest.mark.parametrize("bad", [-1, 255, np.nan, 1.5])
@pytest.mark.parametrize("name", LOSSES)
def test_value_checks_name_position_and_value(name, bad):
    loss = getattr(xentjax, name)
    p, t = np.full((2, 3), 0.5, np.float32), np.ones((2, 3), np.float32)
    t[1, 2] = bad
    keep = np.ones((2, 3), bool)
    wanted = rf"targets: expected values in \[0, 1\], got {bad}.* at position \[1 2\]"
    loss(p, t)
    with xentjax.value_checks():
        loss(p, np.clip(np.nan_to_num(t), 0, 1))
        with pytest.raises(ValueError, match=wanted):
            loss(p, t)
        with pytest.raises(ValueError, match=wanted):
            loss(p, t, where=keep)
        keep[1, 2] = False
        assert np.isfinite(loss(p, t, where=keep)).all()
        with pytest.raises(ValueError, match=r"got 2.* at position \[\]"):
            xentjax.sigmoid_binary_cross_entropy(0.0, 2)


# Settings.


@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("dtype", mainly(["float32", "bfloat16", "float16"], "float32", "bfloat16"))
@pytest.mark.parametrize("name", LOSSES)
def test_strict_settings(name, dtype, x64):
    """The same dtypes whatever the switches, an empty batch among the shapes."""
    loss = getattr(xentjax, name)
    with (
        jax.enable_x64(x64),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        for shape in [(2, 3), (0, 3)]:
            p, t = jnp.full(shape, 0.5, dtype), jnp.ones(shape, bool)

            def total(p, t, where):
                return loss(p, t, where=where).sum()

            value, gradient = jax.eval_shape(jax.value_and_grad(total), p, t, t)
            assert (value.dtype, gradient.dtype) == (jnp.float32, jnp.dtype(dtype))
            assert loss(p, t).dtype == jnp.float32


# Several labels.


@pytest.mark.parametrize("axis", [-1, 0, (0, 2), (1, -1), [2, 1, 0]])
def test_multilabel_is_the_sum_of_its_labels(axis):
    rng = np.random.default_rng(0)
    z = 5 * rng.standard_normal((2, 3, 4)).astype(np.float32)
    t = rng.integers(0, 2, z.shape)
    axes = axis if isinstance(axis, int) else tuple(axis)
    each = np.asarray(xentjax.sigmoid_binary_cross_entropy(z, t), np.float64)
    got = xentjax.multilabel_cross_entropy(z, t, axis=axis)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, each.sum(axes), rtol=4e-6)


def test_nothing_to_lose():
    nothing = np.zeros((0, 3), np.float32)
    assert xentjax.sigmoid_binary_cross_entropy(nothing, nothing).shape == (0, 3)
    assert xentjax.multilabel_cross_entropy(nothing, nothing).shape == (0,)
    np.testing.assert_array_equal(xentjax.multilabel_cross_entropy(nothing.T, nothing.T), [0] * 3)
    assert xentjax.sigmoid_binary_cross_entropy(0.0, True).shape == ()


# Others' formulas.


def test_agrees_with_optax():
    rng = np.random.default_rng(1)
    z, t = 8 * rng.standard_normal((50, 4)), rng.random((50, 4))
    with jax.enable_x64(True):
        ours = functools.partial(jax.vjp, xentjax.sigmoid_binary_cross_entropy)
        theirs = functools.partial(jax.vjp, optax.sigmoid_binary_cross_entropy)
        (got, got_vjp), (want, want_vjp) = ours(z, t), theirs(z, t)
        np.testing.assert_allclose(got, want, rtol=1e-13)
        for a, b in zip(got_vjp(jnp.ones_like(got)), want_vjp(jnp.ones_like(got)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", ["sigmoid_binary_cross_entropy", "multilabel_cross_entropy"])
@pytest.mark.parametrize("differentiate", [False, True])
def test_nothing_of_the_logits_size_beside_arguments_and_results(loss, differentiate):
    def mean(z, t):
        return getattr(xentjax, loss)(z, t).mean()

    logits = jax.ShapeDtypeStruct((4096, 1000), jnp.float32)
    function = jax.value_and_grad(mean) if differentiate else mean
    memory = jax.jit(function).lower(logits, logits).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 0.01 * logits.size * 4


# Weights of yes and no, and the asymmetric loss.


def exact_sides(z, t, shape_yes, shape_no):
    """Returns t · shape_yes(softplus(−z)) + (1 − t) · shape_no(softplus(z)) as a function of z."""

    def loss(z):
        yes, no = MP.log1p(MP.exp(-z)), MP.log1p(MP.exp(z))
        return t * shape_yes(yes) + (1 - t) * shape_no(no)

    return loss(z), MP.diff(loss, z), MP.diff(loss, z, 2)


def focal_of(gamma):
    return lambda loss: (1 - MP.exp(-loss)) ** gamma * loss


def with_margin(margin, gamma):
    def shape(loss):
        p_m = max(1 - MP.exp(-loss) - margin, MP.mpf(0))
        return -(p_m**gamma) * MP.log(1 - p_m)

    return shape


SHAPED = {
    "weights": (
        functools.partial(xentjax.sigmoid_binary_cross_entropy, pos_weight=3.0, neg_weight=0.5),
        lambda loss: 3 * loss,
        lambda loss: loss / 2,
    ),
    "asymmetric": (
        lambda z, t: xentjax.asymmetric_cross_entropy(z, t, 1.0, 4.0, 0.05),
        focal_of(1),
        with_margin(MP.mpf(float(np.float32(0.05))), 4),
    ),
    "asymmetric without a margin": (
        lambda z, t: xentjax.asymmetric_cross_entropy(z, t, 0.0, 2.0, 0.0),
        lambda loss: loss,
        focal_of(2),
    ),
}


@pytest.mark.parametrize("name", SHAPED)
def test_shaped_losses_and_two_derivatives_are_exact(name):
    function, yes, no = SHAPED[name]
    z = np.tile(np.float32([-70, -20, -3.5, -1, 0, 0.5, 2, 3.3, 15, 70]), 3)
    t = np.repeat(np.float32([0, 1, 0.25]), 10)
    slope = jax.grad(function)
    got = jit(lambda z, t: [jax.vmap(f)(z, t) for f in (function, slope, jax.grad(slope))])(z, t)
    for i in range(len(z)):
        for actual, want in zip(got, exact_sides(exact(z[i]), exact(t[i]), yes, no), strict=True):
            if abs(want) > 1e-36:
                # At p near the margin, p − margin has the rounding of p.
                bound = MP.mpf(4e-6) * abs(want) + MP.mpf(2e-7) * (name == "asymmetric") / 10
                assert abs(exact(actual[i]) - want) <= bound, (z[i], t[i])


def test_shaped_losses_of_certainty():
    inf = np.inf
    z, t = np.array([inf, -inf, inf, -inf], np.float32), np.array([1, 0, 0, 1], np.float32)
    for name, (function, *_) in SHAPED.items():
        losses, to_z = jit(jax.vmap(jax.value_and_grad(function)))(z, t)
        np.testing.assert_array_equal(losses[:2], [0, 0])
        assert losses[3] == inf
        assert np.isinf(losses[2]) == (name != "asymmetric")  # The margin bounds what a no costs.
        assert np.isfinite(to_z).all()
        np.testing.assert_array_equal(to_z[:2], [0, 0])


@pytest.mark.parametrize(
    "mode", mainly(["jacrev of jacrev", "jacfwd of jacfwd"], "jacfwd of jacfwd")
)
def test_second_derivatives_of_shaped_losses_in_a_loop(mode):
    """In float64, beside the plain formulas outside of a loop."""
    z, t = np.array([-2.0, 0.3, 1.5]), np.array([1.0, 0.0, 0.4])

    def ours(z, t):
        weighted, asymmetric = SHAPED["weights"][0], SHAPED["asymmetric"][0]
        return LOOPS["map"](lambda *x: weighted(*x) + asymmetric(*x), (z, t))

    def plain(z, t):
        p = jax.nn.sigmoid(z)
        p_m = jnp.maximum(p - 0.05, 0)
        yes = -jnp.log(p) * (3 + (1 - p))
        no = -jnp.log(1 - p) / 2 - p_m**4 * jnp.log(1 - p_m)
        return (t * yes + (1 - t) * no).sum()

    with jax.enable_x64(True):
        got, want = (jit(SECOND[mode](f))(z, t) for f in (ours, plain))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), got, want
        )


def test_weights_are_one_for_all_one_for_each_label_or_one_for_each_element():
    rng = np.random.default_rng(8)
    z, t = rng.normal(size=(2, 3, 4)).astype("f"), rng.integers(0, 2, (2, 3, 4))
    each = rng.random(z.shape).astype("f")
    yes = np.where(t == 1, xentjax.sigmoid_binary_cross_entropy(z, t), 0)
    no = np.where(t == 0, xentjax.sigmoid_binary_cross_entropy(z, t), 0)
    for weight in (np.float32(2), each[0, 0], each):
        got = xentjax.sigmoid_binary_cross_entropy(z, t, pos_weight=weight)
        np.testing.assert_allclose(got, weight * yes + no, rtol=1e-6)
        got = xentjax.sigmoid_binary_cross_entropy(z, t, neg_weight=weight)
        np.testing.assert_allclose(got, yes + weight * no, rtol=1e-6)
    labels = each[0, :, 0]  # Of axis 1.
    got = xentjax.multilabel_cross_entropy(z, t, axis=1, pos_weight=labels)
    np.testing.assert_allclose(got, (labels[:, None] * yes + no).sum(1), rtol=1e-6)
    got = xentjax.multilabel_cross_entropy(z, t, axis=(2, 1), pos_weight=each[0].T)
    np.testing.assert_allclose(got, (each[0] * yes + no).sum((1, 2)), rtol=1e-6)


def test_smoothing_of_yes_and_no_and_of_classes_are_told_apart():
    t = jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    np.testing.assert_allclose(xentjax.smooth_binary_labels(t, 0.2), 0.8 * t + 0.1, rtol=1e-6)
    np.testing.assert_array_equal(
        xentjax.smooth_binary_labels(t == 1, 0.2), xentjax.smooth_binary_labels(t, 0.2)
    )
    with pytest.raises(TypeError, match="smooth_binary_labels is for yes or no"):
        xentjax.smooth_labels(t == 1, 0.2)
    with pytest.raises(TypeError, match="smooth_binary_labels for yes or no"):
        xentjax.sigmoid_binary_cross_entropy(t, xentjax.smooth_labels(t.astype(int), 0.2))
    with xentjax.value_checks():
        with pytest.raises(ValueError, match=r"smooth_binary_labels.* got 2.* at position \[0\]"):
            xentjax.smooth_labels(t, 0.2)
        xentjax.smooth_labels(t[1:], 0.2)
        with pytest.raises(ValueError, match=r"values in \[0, 1\], got 7"):
            xentjax.smooth_binary_labels(jnp.array([1, 7]), 0.2)


def test_class_balanced_weights():
    counts = np.array([900, 100, 0, 10])
    effective = (1 - 0.9999 ** np.array([900.0, 100, 10])) / (1 - 0.9999)
    want = 3 / effective / (1 / effective).sum()
    got = xentjax.class_balanced_weights(counts, 0.9999)
    np.testing.assert_allclose(got, [want[0], want[1], 0, want[2]], rtol=1e-6)
    np.testing.assert_allclose(
        xentjax.class_balanced_weights(counts[:2], 1.0), [0.2, 1.8], rtol=1e-6
    )
    np.testing.assert_array_equal(xentjax.class_balanced_weights(counts, 0.0), [1, 1, 0, 1])
