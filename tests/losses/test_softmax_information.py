"""Surprisal, entropy and divergence of logits: against mpmath, and the forms of probabilities."""

import functools
import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from cases import jit, mainly

import xentjax

MP = mpmath.mp.clone()
MP.dps = 50


def exact(x):
    return MP.mpf(float(x))


def of_logits(a, b):
    return {
        "surprisal": xentjax.softmax_surprisal(a),
        "entropy": xentjax.softmax_entropy(a),
        "divergence": xentjax.softmax_kl_divergence(a, b),
        "cross-entropy": xentjax.softmax_cross_entropy(a, jax.nn.softmax(b)),
    }


def of_probabilities(a, b):
    p, q = jax.nn.softmax(a), jax.nn.softmax(b)
    return {
        "surprisal": xentjax.surprisal(p),
        "entropy": xentjax.entropy(p),
        "divergence": xentjax.kl_divergence(p, q),
        "cross-entropy": xentjax.cross_entropy(q, p),
    }


def test_logit_forms_agree_with_probability_forms():
    """Values, and gradients to both arguments, in float64."""
    logits = 3 * np.random.default_rng(13).standard_normal((2, 12, 7))
    weights = np.arange(7.0)  # So that the surprisals' gradient is not that of their sum.

    def of_both(measured):
        def summed(a, b):
            values = measured(a, b)
            return {k: jnp.sum(weights * v if v.ndim == 2 else v) for k, v in values.items()}

        def values_and_gradients(a, b):
            return measured(a, b), jax.jacrev(summed, (0, 1))(a, b)

        return jit(values_and_gradients)

    with jax.enable_x64(True):
        got, want = (of_both(f)(*logits) for f in (of_logits, of_probabilities))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14), got, want)


def mp_surprisals(z):
    z = [exact(x) for x in z]
    normalizer = MP.log(MP.fsum(map(MP.exp, z)))
    return [normalizer - x for x in z]


@pytest.mark.parametrize("margin", [-80.0, -20.0, -1.0, 0.0, 0.5, 10.0, 17.0, 30.0, 80.0])
def test_logit_forms_are_exact_when_confident(margin):
    a = np.array([[margin, 0.0, -1.5], [2.0, 2.0 - margin, 2.0]], np.float32)
    b = np.array([[0.3, -0.2, margin], [margin, 1.0, 0.0]], np.float32)
    surprisals, entropies = xentjax.softmax_surprisal(a), xentjax.softmax_entropy(a)
    divergences = xentjax.softmax_kl_divergence(a, b)
    for i in range(len(a)):
        s, r = mp_surprisals(a[i]), mp_surprisals(b[i])
        np.testing.assert_allclose(surprisals[i], np.array(s, float), rtol=1e-6)
        p = [MP.exp(-x) for x in s]
        entropy = MP.fsum(x * y for x, y in zip(p, s, strict=True))
        np.testing.assert_allclose(entropies[i], float(entropy), rtol=1e-6)
        terms = [x * (v - u) for x, u, v in zip(p, s, r, strict=True)]
        size = MP.fsum(x * (u + v) for x, u, v in zip(p, s, r, strict=True))
        assert abs(exact(divergences[i]) - MP.fsum(terms)) <= 1e-6 * size


def test_impossible_classes_of_logits():
    inf = np.inf
    a = np.array([[0.0, 0.0, -inf], [0.0, -inf, -inf]], np.float32)
    b = np.array([[0.0, 1.0, 2.0], [0.0, 0.0, -inf]], np.float32)
    np.testing.assert_allclose(xentjax.softmax_entropy(a), [math.log(2), 0], rtol=1e-7)
    np.testing.assert_allclose(
        xentjax.softmax_surprisal(a), [[math.log(2)] * 2 + [inf], [0, inf, inf]], rtol=1e-7
    )
    normalizer = math.log(1 + math.e + math.e**2)
    want = [normalizer - 0.5 - math.log(2), math.log(2)]
    np.testing.assert_allclose(xentjax.softmax_kl_divergence(a, b), want, rtol=1e-6)
    np.testing.assert_array_equal(xentjax.softmax_kl_divergence(b, a), [inf, inf])
    to_a, to_b = jax.grad(lambda *z: xentjax.softmax_kl_divergence(*z).sum(), (0, 1))(a, b)
    np.testing.assert_allclose(to_b, jax.nn.softmax(b) - jax.nn.softmax(a), rtol=1e-6, atol=1e-7)
    # p_v · ((s_q − s_p)_v − KL), by hand for the first row.
    np.testing.assert_allclose(to_a, [[0.25, -0.25, 0], [0, 0, 0]], atol=1e-6)
    assert np.isfinite(jax.grad(lambda z: xentjax.softmax_entropy(z).sum())(a)).all()


# The divergence of logits, relative to its value.


def mp_divergence(a, b):
    """Returns KL and its derivatives to a and b, for one row, at 50 digits."""
    s, r = mp_surprisals(a), mp_surprisals(b)
    p, q = ([MP.exp(-x) for x in surprisals] for surprisals in (s, r))
    divergence = MP.fsum(x * (v - u) for x, u, v in zip(p, s, r, strict=True))
    to_a = [x * (v - u - divergence) for x, u, v in zip(p, s, r, strict=True)]
    to_b = [y - x for x, y in zip(p, q, strict=True)]
    return divergence, to_a, to_b


divergence_and_gradients = jit(jax.vmap(jax.value_and_grad(xentjax.softmax_kl_divergence, (0, 1))))


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("difference", [0.0, 1e-6, 1e-4, 1.0, 50.0, 500.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_divergence_of_logits_is_exact_relative_to_its_value(dtype, difference, offset):
    """And so is every entry of its gradient; two surprisals would leave noise of an ulp."""
    rng = np.random.default_rng(3)
    with jax.enable_x64(dtype == "float64"):
        a = rng.normal(0, 4, (6, 20)).astype(dtype)
        b = (a + offset + difference * rng.normal(size=a.shape)).astype(dtype)
        grad = divergence_and_gradients
        values, gradients = grad(a, b)
    eps = float(np.finfo(dtype).eps)
    widest = max(float(np.ptp(x, axis=-1).max()) for x in (a, b))
    rtol = max(8 * eps, eps * widest)  # Half an ulp of the widest logit, of p and of q.
    for i in range(len(a)):
        divergence, *slopes = mp_divergence(a[i], b[i])
        np.testing.assert_allclose(float(values[i]), float(divergence), rtol=rtol)
        for got, want in zip(gradients, slopes, strict=True):
            size = float(max(map(abs, want)))
            np.testing.assert_allclose(
                np.asarray(got[i], float), np.array(want, float), rtol=4 * rtol, atol=rtol * size
            )


def test_divergence_of_confident_logits():
    """A leader of p that is nearly certain hides neither the value nor the gradient of the rest."""
    a = np.array([[0, -40, -60], [20, 0, 1], [0, -200, -300], [3, 3, -30]], np.float32)
    b = np.array([[5, -34, -60], [19, 0, 3], [0, 250, -1], [3, 3, -29]], np.float32)
    grad = jit(jax.vmap(jax.value_and_grad(xentjax.softmax_kl_divergence, (0, 1))))
    values, (to_a, to_b) = grad(a, b)
    for i in range(len(a)):
        divergence, want_a, want_b = mp_divergence(a[i], b[i])
        np.testing.assert_allclose(values[i], float(divergence), rtol=2e-5)
        tiny = float(np.finfo(np.float32).tiny)
        np.testing.assert_allclose(to_a[i], np.array(want_a, float), rtol=2e-5, atol=tiny)
        np.testing.assert_allclose(to_b[i], np.array(want_b, float), rtol=2e-5, atol=tiny)


def masked_divergence(a, b, where):
    """Returns divergences of the classes that are kept, in float64, row by row."""
    rows = []
    for x, y, keep in zip(a, b, where, strict=True):
        divergence = mp_divergence(x[keep], y[keep])[0] if keep.any() else 0
        rows.append(float(divergence))
    return np.array(rows)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_divergence_of_logits_under_masks(junk):
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(2, 4, 5)).astype(np.float32)
    classes = rng.random(a.shape) < 0.7
    classes[1] = False  # No class is left: nothing happens, which costs nothing.
    examples = np.array([True, False, True, False])
    everything = np.ones_like(classes)
    for where, keep, want in [
        (classes, classes, masked_divergence(a, b, classes)),
        (
            examples,
            examples[:, None] & everything,
            np.where(examples, masked_divergence(a, b, everything), 0),
        ),
    ]:
        bad = [np.where(keep, x, np.float32(junk)) for x in (a, b)]

        def total(a, b, where=where):
            losses = xentjax.softmax_kl_divergence(a, b, where=where)
            return losses.sum(), losses

        gradients, losses = jit(jax.grad(total, (0, 1), has_aux=True))(*bad)
        np.testing.assert_allclose(losses, want, rtol=1e-6)
        for gradient in gradients:
            np.testing.assert_array_equal(gradient[~keep], 0)
            assert np.isfinite(gradient).all()


MODES = {
    "hessian": jax.hessian,
    "jacrev of jacrev": lambda f, n: jax.jacrev(jax.jacrev(f, n), n),
    "jacfwd of jacfwd": lambda f, n: jax.jacfwd(jax.jacfwd(f, n), n),
    "jacrev of jacfwd": lambda f, n: jax.jacrev(jax.jacfwd(f, n), n),
}


def plain_kl(p, log_p, log_q):
    return jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0))


def plain_divergence(a, b):
    p = jax.nn.softmax(a)
    return plain_kl(p, jnp.log(jnp.where(p > 0, p, 1)), jax.nn.log_softmax(b))


def plain_js(a, b, beta=0.3):
    p, q = jax.nn.softmax(a), jax.nn.softmax(b)
    log_p, log_q, log_m = (
        jnp.log(jnp.where(x > 0, x, 1)) for x in (p, q, beta * p + (1 - beta) * q)
    )
    return beta * plain_kl(p, log_p, log_m) + (1 - beta) * plain_kl(q, log_q, log_m)


IN_A_LOOP = {
    "kl": (xentjax.softmax_kl_divergence, plain_divergence),
    "js": (functools.partial(xentjax.softmax_js_divergence, beta=0.3), plain_js),
}


@pytest.mark.parametrize(
    "case",
    mainly(
        [("kl", mode) for mode in MODES] + [("js", "jacrev of jacrev"), ("js", "jacfwd of jacfwd")],
        ("js", "jacfwd of jacfwd"),
    ),
    ids=str,
)
def test_second_derivatives_of_logit_divergence_in_a_loop(case):
    """Beside those of the probabilities' formula, outside of a loop, with classes impossible."""
    name, mode = case
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(2, 3, 4))
    a[:, 1] = -np.inf
    if name == "js":
        b[1:, 2] = b[2, 1] = -np.inf
    ours, plain = IN_A_LOOP[name]

    def looped(a, b):
        return jax.lax.map(lambda x: ours(*x), (a, b)).sum()

    @jit
    def every(a, b):
        return MODES[mode](looped, (0, 1))(a, b), jax.hessian(plain, (0, 1))(a, b)

    with jax.enable_x64(True):
        np.testing.assert_allclose(jit(looped)(a, b), plain(a, b), rtol=1e-12)
        got, want = (np.nan_to_num(np.array(each)) for each in every(a, b))
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


# The Jensen-Shannon divergence of logits.


def mp_js(a, b, beta):
    """Returns JS and its derivatives to a and b, for one row, at 50 digits."""
    p, q = ([MP.exp(-x) for x in mp_surprisals(z)] for z in (a, b))
    m = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
    parts = []
    for share, row in ((beta, p), (1 - beta, q)):
        ratios = [MP.log(x / y) for x, y in zip(row, m, strict=True)]
        kl = MP.fsum(x * r for x, r in zip(row, ratios, strict=True))
        parts.append((share * kl, [share * x * (r - kl) for x, r in zip(row, ratios, strict=True)]))
    return parts[0][0] + parts[1][0], parts[0][1], parts[1][1]


@pytest.mark.parametrize("beta", [0.5, 0.1, 0.99])
def test_js_divergence_of_logits_is_exact_however_near_or_far_they_are(beta):
    rng = np.random.default_rng(7)
    differences = np.repeat([0, 1e-6, 1e-4, 1e-2, 1, 50, 500], 2)[:, None]
    offsets = np.tile([0, 100], 7)[:, None]
    a = rng.normal(0, 4, (14, 20)).astype(np.float32)
    b = (a + offsets + differences * rng.normal(size=a.shape)).astype(np.float32)

    def total(a, b):
        losses = xentjax.softmax_js_divergence(a, b, beta=beta)
        return losses.sum(), losses

    gradients, values = jit(jax.grad(total, (0, 1), has_aux=True))(a, b)
    for i in range(len(a)):
        widest = max(float(np.ptp(x)) for x in (a[i], b[i]))
        rtol = max(1e-6, 2**-23 * widest)  # An ulp of the widest logit.
        divergence, *slopes = mp_js(a[i], b[i], MP.mpf(beta))
        tiny = float(np.finfo(np.float32).tiny)
        np.testing.assert_allclose(float(values[i]), float(divergence), rtol=rtol, atol=tiny)
        for got, want in zip(gradients, slopes, strict=True):
            size = float(max(map(abs, want)))
            # Where both are certain of different classes, what is left of log m is rounding.
            bound = rtol * size + 1e-12
            np.testing.assert_allclose(got[i], np.array(want, float), rtol=0, atol=bound)


def test_js_divergence_of_impossible_classes_and_its_limits():
    inf = np.inf
    a = np.array([[0, -inf, -inf], [0, 0, -inf], [1, 2, 3], [-inf] * 3], np.float32)
    b = np.array([[-inf, 0, -inf], [0, 0, -inf], [1, 2, 3], [1, 2, 3]], np.float32)
    loss = jit(jax.vmap(jax.value_and_grad(xentjax.softmax_js_divergence, (0, 1))))
    values, gradients = loss(a, b)
    np.testing.assert_allclose(values, [np.log(2), 0, 0, 0], rtol=1e-6)
    assert np.isfinite(gradients).all()
    p, q = jax.nn.softmax(np.array([[1.0, 2, 0], [0.5, 0, 1]], np.float32))
    of_logits = xentjax.softmax_js_divergence(jnp.log(p), jnp.log(q), base=2)
    np.testing.assert_allclose(of_logits, xentjax.js_divergence(p, q, base=2), rtol=1e-6)
    small = xentjax.softmax_js_divergence(jnp.log(p), jnp.log(q), beta=1e-4) / 1e-4
    np.testing.assert_allclose(small, xentjax.kl_divergence(p, q), rtol=1e-3)


@pytest.mark.parametrize("place", [(1, 2), (1, slice(None))], ids=str)
@pytest.mark.parametrize("spoiled", [0, 1])
@pytest.mark.parametrize(
    "divergence", [xentjax.softmax_kl_divergence, xentjax.softmax_js_divergence]
)
def test_a_nan_of_either_is_in_the_whole_row_and_in_no_other(divergence, spoiled, place):
    logits = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)
    logits[spoiled][place] = np.nan
    losses, pull_back = jax.vjp(divergence, *logits)
    gradients = pull_back(jnp.ones_like(losses))
    rows = np.array([False, True, False])
    np.testing.assert_array_equal(np.isnan(losses), rows)
    for gradient in gradients:
        np.testing.assert_array_equal(np.isnan(gradient), np.broadcast_to(rows[:, None], (3, 5)))
