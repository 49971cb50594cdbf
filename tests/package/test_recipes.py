"""The losses of docs/recipes.md, each held against its formula in float64."""

import ast
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import jit

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
RNG = np.random.default_rng(0)


@functools.cache
def page():
    """Returns the functions of the page, and its mesh; `test_docs.py` runs all of its code."""
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
    tree, names = ast.parse(code), {}
    kinds = ast.Import | ast.ImportFrom | ast.FunctionDef
    tree.body = [x for x in tree.body if isinstance(x, kinds) or ast.unparse(x).startswith("mesh ")]
    exec(compile(tree, "docs/recipes.md", "exec"), names)
    return names


def normal(*shape):
    return RNG.standard_normal(shape)


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def at(x, labels):
    return jnp.take_along_axis(x, labels[..., None], axis=-1)[..., 0]


def log_softmax(z):
    return z - jnp.log(jnp.exp(z).sum(-1, keepdims=True))


def kl(p_logits, q_logits):
    p, q = log_softmax(p_logits), log_softmax(q_logits)
    return (jnp.exp(p) * (p - q)).sum(-1)


# Each case: the recipe's name, its options, its arguments, and its formula.

N, D, V, K, T = 6, 4, 10, 3, 2.0
TEACHER, STUDENT = 2 * normal(N, V), 2 * normal(N, V)
FEATURES, KERNEL, ROWS = normal(N, D), normal(D, V), normal(V, D)
STORED = -np.sort(np.log(np.exp(TEACHER).sum(-1, keepdims=True)) - TEACHER, axis=-1)[:, :K]
LABELS = RNG.integers(0, V, N)
PRIOR = RNG.dirichlet(np.ones(V))


def plain_top_k(features, kernel, teacher, tail):
    best = jax.lax.top_k(teacher, K)[1]
    kept = (best[..., None] == jnp.arange(V)).any(-2)
    p = jnp.exp(log_softmax(teacher / T))
    rest = jnp.where(kept, 0, p).sum(-1, keepdims=True)
    p = jnp.where(kept, p, 0)
    p = p / (1 - rest) if tail == "drop" else p + rest / V
    p = jax.lax.stop_gradient(p)
    return -(T**2) * (p * log_softmax(features @ kernel / T)).sum(-1).mean()


def plain_buckets(student, teacher):
    best = jax.lax.top_k(teacher, K)[1]
    kept = (best[..., None] == jnp.arange(V)).any(-2)

    def buckets(z):
        p = jnp.exp(log_softmax(z / T))
        rest = jnp.where(kept, 0, p).sum(-1, keepdims=True)
        return jnp.log(jnp.concatenate([jnp.take_along_axis(p, best, axis=-1), rest], axis=-1))

    return T**2 * kl(jax.lax.stop_gradient(buckets(teacher)), buckets(student))


def plain_info_nce(queries, keys, tau):
    return -jnp.diagonal(log_softmax(queries @ keys.T / tau))


def plain_clip(images, texts, log_scale):
    a, b = unit(images), unit(texts)
    tau = jnp.exp(-log_scale)
    return (plain_info_nce(a, b, tau) + plain_info_nce(b, a, tau)) / 2


def plain_sim_clr(a, b):
    views = unit(jnp.concatenate([a, b]))
    s = views @ views.T / 0.5
    s = jnp.where(np.eye(2 * N, dtype=bool), -jnp.inf, s)
    return -at(log_softmax(s), np.roll(np.arange(2 * N), N))


def plain_mo_co(queries, keys, queue):
    keys = jax.lax.stop_gradient(jnp.concatenate([unit(keys), queue]))
    return plain_info_nce(unit(queries), keys, 0.07)


def plain_face(features, kernel, scale, lower):
    cosines = unit(features) @ unit(kernel).T
    own = jax.nn.one_hot(LABELS, V, dtype=bool)
    return -at(log_softmax(scale * jnp.where(own, lower(cosines), cosines)), LABELS)


def arc(cosines):
    angles = jnp.arccos(cosines)
    far = cosines - 0.5 * np.sin(0.5)
    return jnp.where(angles <= np.pi - 0.5, jnp.cos(angles + 0.5), far)


def plain_adjusted(logits):
    return -at(log_softmax(logits + 0.7 * jnp.log(PRIOR)), LABELS)


def sigmoid(x):
    return 1 / (1 + jnp.exp(-x))


def odds(log_p):
    return jnp.exp(log_p) / (1 - jnp.exp(log_p))


def plain_grpo(logs, old, reference, advantage):
    ratio, gain = jnp.exp(logs) / jnp.exp(old), advantage[:, None]
    clipped = jnp.where(ratio > 1.2, 1.2, jnp.where(ratio < 0.8, 0.8, ratio))
    away = jnp.exp(reference) / jnp.exp(logs) - (reference - logs) - 1
    return 0.04 * away - jnp.minimum(ratio * gain, clipped * gain)


LOGS = [-np.abs(normal(N)) for _ in range(4)]
TOKEN_LOGS = [-np.abs(normal(N, 5)) for _ in range(3)]

CASES = {
    "distillation": (
        {},
        (STUDENT, TEACHER),
        lambda student, teacher: T**2 * kl(teacher / T, student / T),
    ),
    "top_k_distillation": (
        {"k": K},
        (FEATURES, KERNEL, TEACHER),
        functools.partial(plain_top_k, tail="drop"),
    ),
    "top_k_distillation, background": (
        {"k": K, "tail": "background"},
        (FEATURES, KERNEL, TEACHER),
        functools.partial(plain_top_k, tail="background"),
    ),
    "bucket_distillation": ({"k": K}, (STUDENT, TEACHER), plain_buckets),
    "stored_bucket_distillation": (
        {"indices": np.argsort(-TEACHER, axis=-1)[:, :K], "log_probabilities": STORED},
        (FEATURES, KERNEL),
        lambda features, kernel: plain_buckets(T * (features @ kernel), T * TEACHER) / T**2,
    ),
    "clip": ({}, (FEATURES, normal(N, D), np.float64(1.5)), plain_clip),
    "sim_clr": ({}, (FEATURES, normal(N, D)), plain_sim_clr),
    "mo_co": ({}, (FEATURES, normal(N, D), normal(7, D)), plain_mo_co),
    "sharded_contrast": (
        {},
        (normal(8, D), normal(16, D)),
        functools.partial(plain_info_nce, tau=0.07),
    ),
    "cos_face": (
        {"labels": LABELS},
        (FEATURES, ROWS),
        functools.partial(plain_face, scale=64.0, lower=lambda c: c - 0.35),
    ),
    "arc_face": (
        {"labels": LABELS},
        (FEATURES, ROWS),
        functools.partial(plain_face, scale=64.0, lower=arc),
    ),
    "logit_adjusted": ({"labels": LABELS, "prior": PRIOR, "tau": 0.7}, (STUDENT,), plain_adjusted),
    "logit_adjusted_head": (
        {"labels": LABELS, "prior": PRIOR, "tau": 0.7},
        (FEATURES, KERNEL),
        lambda features, kernel: plain_adjusted(features @ kernel),
    ),
    "dpo": (
        {},
        LOGS,
        lambda c, r, ref_c, ref_r: -jnp.log(sigmoid(0.1 * (c - ref_c - r + ref_r))),
    ),
    "sim_po": ({}, LOGS[:2], lambda c, r: -jnp.log(sigmoid(2.0 * (c - r) - 1.0))),
    "or_po": (
        {},
        LOGS[:2],
        lambda c, r: -c - 0.1 * jnp.log(sigmoid(jnp.log(odds(c) / odds(r)))),
    ),
    "grpo": ({}, (*TOKEN_LOGS, normal(N)), plain_grpo),
}


# The functions that these call have tests of their derivatives.
VALUES_ALONE = {"distillation", "clip", "mo_co", "sharded_contrast", "cos_face", "logit_adjusted"}


def with_gradient(function):
    """Returns (losses, the gradient of a weighted sum of them)."""

    def total(args):
        losses = function(*args)
        weights = jnp.linspace(0.5, 1.5, losses.size).reshape(losses.shape)
        return (weights * losses).sum(), losses

    return jit(jax.grad(total, has_aux=True))


def value_alone(function):
    return jit(lambda args: function(*args))


@pytest.mark.parametrize("case", CASES)
def test_a_recipe_is_its_formula(case):
    options, args, formula = CASES[case]
    recipe = functools.partial(page()[case.split(",")[0]], **options)
    with jax.enable_x64(True):
        args = tuple(map(jnp.asarray, args))
        look = value_alone if case in VALUES_ALONE else with_gradient
        got, want = (look(f)(args) for f in (recipe, formula))
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10), got, want
        )


def test_the_log_probabilities_of_tokens():
    features, tokens = normal(2, 5, D), RNG.integers(0, V, (2, 5))
    mask = np.arange(5) >= np.array([[2], [3]])
    with jax.enable_x64(True):
        features, kernel = jnp.asarray(features), jnp.asarray(KERNEL)
        names = "token_log_probabilities", "mean_log_probability"
        of_tokens, mean = jit(lambda *args: [page()[name](*args) for name in names])(
            features, kernel, tokens, mask
        )
        want = jnp.where(mask, at(log_softmax(features @ kernel), tokens), 0)
        np.testing.assert_allclose(of_tokens, want, rtol=1e-12)
        np.testing.assert_allclose(mean, want.sum(-1) / mask.sum(-1), rtol=1e-12)


def test_advantages():
    rewards = normal(3, 4)
    want = (rewards - rewards.mean(1)[:, None]) / (rewards.std(1)[:, None] + 1e-4)
    with jax.enable_x64(True):
        np.testing.assert_allclose(page()["advantages"](jnp.asarray(rewards)), want, rtol=1e-12)


def test_preferences_and_rewards_without_logits_in_memory():
    """The logits of both answers would be 2048 MiB."""
    names, pairs, length, features, vocabulary = page(), 8, 1024, 64, 2**15

    def loss(kernel, hidden, tokens, mask, constants):
        logs = names["token_log_probabilities"](hidden, kernel, tokens, mask)
        sums, counts = logs.sum(-1), mask.sum(-1).astype(logs.dtype)
        means = sums / counts
        c, r = means[:pairs], means[pairs:]
        each = names["dpo"](sums[:pairs], sums[pairs:], *constants[:2])
        each += names["sim_po"](c, r) + names["or_po"](c, r)
        return each.sum() + names["grpo"](logs, logs - 0.1, logs - 0.2, counts).sum()

    def floats(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    batch = 2 * pairs, length
    shapes = (
        floats(features, vocabulary),
        floats(*batch, features),
        jax.ShapeDtypeStruct(batch, jnp.int32),
        jax.ShapeDtypeStruct(batch, bool),
        floats(2, pairs),
    )
    compiled = jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 2**29
