"""Bad calls of every public function, and what the error of each must say."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import xentjax as xj
from xentjax import SparseTargets

Z, P = jnp.zeros((4, 3)), jnp.full((4, 3), 1 / 3)
LABELS, LOSSES = jnp.zeros(4, jnp.int32), jnp.ones(4)
IMAGES, KEY = jnp.zeros((4, 8, 8)), jax.random.key(0)
K1 = (LABELS[:, None], jnp.ones((4, 1)))  # Indices and weights that fit Z.
SMOOTHED = xj.smooth_labels(LABELS, 0.1, background=jnp.ones(5) / 5)


def ints(*shape):
    return jnp.ones(shape, jnp.int32)


def bools(*shape):
    return jnp.ones(shape, bool)


class Bad(NamedTuple):
    """A call, and what its error says: `argument: expected … expected …, got … given …`."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    error: type[Exception]
    argument: str
    expected: str
    given: str


def shape_of(argument, expected, given):
    return ValueError, argument, re.escape(expected), re.escape(given)


def kind_of(argument, expected, given):
    return TypeError, argument, expected, re.escape(given)


FLOATS = "floating-point"


def softmax_calls(function):
    """Bad arguments of what takes logits and targets."""
    labels = re.escape("(4,)")
    for targets, given in [
        (ints(1), "1"),
        (ints(4, 3), "4, 3"),
        (ints(3), "3"),
        (SparseTargets(ints(2, 1), jnp.ones((2, 1))), "2, 1"),
    ]:
        yield Bad(function, (Z, targets), {}, ValueError, "targets", labels, rf"[(\[]{given}")
    yield Bad(function, (Z, 1), {}, ValueError, "targets", labels, r"\(\)|int32\[\]")
    for *shape, given in [(1, 3, "[1, 3]"), (4, 5, "[4, 5]"), (4, "[4]"), (3, 4, "[3, 4]")]:
        dense = jnp.ones(shape)
        yield Bad(function, (Z, dense), {}, *shape_of("targets", "(4, 3)", "float32" + given))
    for targets, given in [(bools(4, 3), "bool"), (Z.astype(complex), "complex64"), (None, "None")]:
        yield Bad(function, (Z, targets), {}, *kind_of("targets", "integer labels", given))
    yield Bad(function, (Z, "dog"), {}, *kind_of("targets", "integer labels", "dog"))
    for logits, given in [
        (ints(4, 3), "int32[4, 3]"),
        (bools(4, 3), "bool[4, 3]"),
        (Z.astype(complex), "complex64"),
        (None, "None"),
    ]:
        yield Bad(function, (logits, LABELS), {}, *kind_of("logits", FLOATS, given))
    empty = jnp.ones((4, 0))
    yield Bad(function, (empty, LABELS), {}, *shape_of("logits", "at least one class", "[4, 0]"))
    yield Bad(function, (Z, LABELS), {"axis": 0}, ValueError, "targets", r"\(3,\)", r"[(\[]4")
    for axis in (2, -3, (0, 2), ()):
        yield Bad(function, (Z, LABELS), {"axis": axis}, *shape_of("axis", "[-2, 2)", str(axis)))
    for axis in (1.0, "classes", None, True, (0, "1")):
        yield Bad(function, (Z, LABELS), {"axis": axis}, *kind_of("axis", "int", repr(axis)))
    for axis in [(1, -1), (0, 0)]:
        yield Bad(function, (Z, 0), {"axis": axis}, *shape_of("axis", "distinct", str(axis)))
    for where, given in [(bools(3), "3"), (bools(4, 1), "4, 1"), (bools(1, 3), "1, 3"), (True, "")]:
        yield Bad(function, (Z, LABELS), {"where": where}, *shape_of("where", "(4,)", "(" + given))
    yield Bad(function, (Z, LABELS), {"where": ints(4)}, *kind_of("where", "bool", "int32[4]"))
    yield Bad(function, (Z, LABELS), {"where": Z}, *kind_of("where", "bool", "float32[4, 3]"))


def sparse_calls():
    """Parts of SparseTargets that do not fit each other, or the logits."""
    one = jnp.ones(4)
    for parts, error in [
        ((K1[0], jnp.ones((4, 2))), shape_of("targets.weights", "(4, 1)", "[4, 2]")),
        ((K1[0], ints(4, 1)), kind_of("targets.weights", FLOATS, "int32[4, 1]")),
        ((K1[1], K1[1]), kind_of("targets.indices", "integers", "float32[4, 1]")),
        ((jnp.int32(0), jnp.ones(())), kind_of("targets.indices", "K", "int32[]")),
        ((*K1, jnp.ones(3)), shape_of("targets.background_mass", "(4,)", "[3]")),
        ((*K1, ints(4)), kind_of("targets.background_mass", FLOATS, "int32[4]")),
        ((*K1, None, jnp.ones(3)), shape_of("targets.background_mass", "", "None")),
        ((*K1, one, jnp.ones(5)), shape_of("targets", "3 classes", "5")),
        ((*K1, one, ints(3)), kind_of("targets.background", FLOATS, "int32[1, 1, 3]")),
        ((*K1, one, jnp.ones((1, 1, 1, 1))), shape_of("targets.background_mass", "(4, 1)", "[4]")),
        (
            (*K1, one[:, None], jnp.ones((4, 1, 3))),
            shape_of("targets.background", "t[i]", "[4, 1, 3]"),
        ),
        ((*K1, one, jnp.ones(())), shape_of("targets.background", "[V]", "[]")),
        ((*K1, one, jnp.ones((2, 3))), shape_of("targets.background_mass", "(4, 2)", "[4]")),
    ]:
        yield Bad(xj.softmax_cross_entropy, (Z, SparseTargets(*parts)), {}, *error)


def sigmoid_calls():
    for function, name in [
        (xj.sigmoid_binary_cross_entropy, "logits"),
        (xj.multilabel_cross_entropy, "logits"),
        (xj.binary_cross_entropy, "probabilities"),
    ]:
        for targets, given in [(LABELS, "[4]"), (jnp.ones((1, 3)), "[1, 3]"), (1.0, "[]")]:
            yield Bad(function, (P, targets), {}, *shape_of("targets", "(4, 3)", given))
        yield Bad(function, (ints(4, 3), P), {}, *kind_of(name, FLOATS, "int32[4, 3]"))
        yield Bad(function, (P, Z.astype(complex)), {}, *kind_of("targets", "float", "complex64"))
        yield Bad(function, (P, "yes"), {}, *kind_of("targets", "float, bool or int", "'yes'"))
        yield Bad(function, (P, P), {"where": Z}, *kind_of("where", "bool", "float32[4, 3]"))
        yield Bad(function, (P, P), {"where": bools(3)}, *shape_of("where", "(4, 3)", "3"))
    multilabel = xj.multilabel_cross_entropy
    yield Bad(multilabel, (Z, Z), {"axis": 2}, *shape_of("axis", "[-2, 2)", "2"))
    yield Bad(multilabel, (Z, Z), {"axis": (0, -2)}, *shape_of("axis", "distinct", "(0, -2)"))
    yield Bad(multilabel, (Z, Z), {"axis": "last"}, *kind_of("axis", "int", "'last'"))


def weight_calls():
    """Weights of yes and no, numbers of a shape, and functions of binary targets."""
    for function in (xj.sigmoid_binary_cross_entropy, xj.multilabel_cross_entropy):
        for name in ("pos_weight", "neg_weight"):
            for weight, error in [
                (jnp.ones(4), shape_of(name, "(3,)", "[4]")),
                (jnp.ones((1, 3)), shape_of(name, "(4, 3)", "[1, 3]")),
                (-1.0, shape_of(name, "[0, inf]", "-1.0")),
                (1j, kind_of(name, "real numbers", "complex64")),
                ("two", kind_of(name, "real numbers", "'two'")),
            ]:
                yield Bad(function, (Z, P), {name: weight}, *error)
        sparse = xj.smooth_labels(LABELS, 0.1)
        yield Bad(function, (Z, sparse), {}, *kind_of("targets", "", "SparseTargets(batch=(4,)"))
    asymmetric = xj.asymmetric_cross_entropy
    yield Bad(asymmetric, (Z, LABELS, 1, 4, 0), {}, *shape_of("targets", "(4, 3)", "[4]"))
    yield Bad(asymmetric, (Z, P, -1, 4, 0), {}, *shape_of("gamma_positive", "[0, inf]", "-1"))
    yield Bad(asymmetric, (Z, P, 1, P, 0), {}, *shape_of("gamma_negative", "scalar", "[4, 3]"))
    yield Bad(asymmetric, (Z, P, 1, 4, 1.5), {}, *shape_of("margin", "[0, 1]", "1.5"))
    for function, name, bad in [
        (xj.focal, "gamma", -1.0),
        (xj.poly1, "epsilon", -2.0),
        (xj.generalized, "q", 1.5),
    ]:
        yield Bad(function, (ints(4), 1.0), {}, *kind_of("losses", FLOATS, "int32[4]"))
        yield Bad(function, (LOSSES, bad), {}, *shape_of(name, "values in", str(bad)))
        yield Bad(function, (LOSSES, jnp.ones(3)), {}, *shape_of(name, "(4,)", "[3]"))
        yield Bad(function, (LOSSES, "two"), {}, *kind_of(name, "real number", "'two'"))
    smooth, balanced = xj.smooth_binary_labels, xj.class_balanced_weights
    yield Bad(smooth, (P, 1.5), {}, *shape_of("alpha", "[0, 1]", "1.5"))
    yield Bad(smooth, (1j * P, 0.1), {}, *kind_of("targets", "float, bool or int", "complex64"))
    sparse = xj.smooth_labels(LABELS, 0.1)
    yield Bad(smooth, (sparse, 0.1), {}, *kind_of("targets", "float, bool or int", "SparseTargets"))
    yield Bad(balanced, (P, 0.9), {}, *shape_of("counts", "[V]", "float32[4, 3]"))
    yield Bad(balanced, (bools(3), 0.9), {}, *kind_of("counts", "int or float", "bool[3]"))
    yield Bad(balanced, (ints(3), 1.5), {}, *shape_of("beta", "[0, 1]", "1.5"))


def calibration_calls():
    for function in (xj.fit_temperature, xj.expected_calibration_error, xj.reliability_bins):
        yield Bad(function, (Z, ints(3)), {}, *shape_of("targets", "(4,)", "(3,)"))
        yield Bad(function, (ints(4, 3), LABELS), {}, *kind_of("logits", FLOATS, "int32[4, 3]"))
        yield Bad(function, (Z, LABELS), {"where": bools(3)}, *shape_of("where", "(4,)", "(3,)"))
        if function is not xj.fit_temperature:
            for bins, error in [
                (0, shape_of("num_bins", "positive int", "0")),
                (1.5, kind_of("num_bins", "positive int", "1.5")),
            ]:
                yield Bad(function, (Z, LABELS), {"num_bins": bins}, *error)
    for function in (xj.brier_score, xj.target_kl_divergence):
        yield from softmax_calls(function)
    product = xj.softmax_hessian_product
    yield Bad(product, (Z, LABELS, Z[:1]), {}, *shape_of("vectors", "(4, 3)", "[1, 3]"))
    yield Bad(product, (Z, LABELS, ints(4, 3)), {}, *kind_of("vectors", FLOATS, "int32[4, 3]"))
    entropy, js = xj.target_entropy, xj.softmax_js_divergence
    yield Bad(entropy, (P, 5), {}, *shape_of("targets", "5 classes", "3"))
    yield Bad(entropy, (LABELS, 0), {}, *shape_of("num_classes", "positive int", "0"))
    yield Bad(entropy, (LABELS, 3), {"base": 1}, *shape_of("base", "positive", "1"))
    for beta, error in [
        (0.0, shape_of("beta", "between 0 and 1", "0.0")),
        (1, shape_of("beta", "between 0 and 1", "1")),
        ("half", kind_of("beta", "number", "'half'")),
    ]:
        yield Bad(js, (Z, Z), {"beta": beta}, *error)


def target_calls():
    smooth, mix = xj.smooth_labels, xj.mix_targets
    for number in ("dog", None, 1j, True):
        yield Bad(smooth, (LABELS, number), {}, *kind_of("alpha", "real number", ""))
        yield Bad(mix, (LABELS, LABELS, number), {}, *kind_of("lam", "real number", ""))
    for function, rest in [
        (smooth, (0.1,)),
        (mix, (P, 0.5)),
        (xj.reweight_targets, (LOSSES[:3],)),
        (xj.dense_targets, (3,)),
    ]:
        for axis, error in [
            (2, shape_of("axis", "[-2, 2)", "2")),
            (1.0, kind_of("axis", "int", "1.0")),
            ((0, 1), kind_of("axis", "int", "(0, 1)")),
        ]:
            yield Bad(function, (P, *rest), {"axis": axis}, *error)
            yield Bad(function, (LABELS, *rest), {"axis": axis}, *error)
    one_mass = shape_of("targets", "one mass per class", "float32[]")
    yield Bad(smooth, (jnp.float32(1), 0.1), {}, *one_mass)
    tiny = P.astype(jnp.float8_e4m3fn)
    yield Bad(smooth, (tiny, 0.1), {}, *kind_of("targets", FLOATS, "float8_e4m3fn[4, 3]"))
    for alpha in (1.5, -0.1, math.nan, math.inf):
        yield Bad(smooth, (LABELS, alpha), {}, *shape_of("alpha", "[0, 1]", str(alpha)))
    yield Bad(smooth, (LABELS, jnp.ones(4)), {}, *shape_of("alpha", "scalar", "[4]"))
    yield Bad(smooth, (bools(4), 0.1), {}, *kind_of("targets", "integer labels", "bool[4]"))
    for targets, background, error in [
        (LABELS, jnp.ones((4, 3)), shape_of("background", "[V]", "[4, 3]")),
        (LABELS, ints(3), kind_of("background", FLOATS, "int32[3]")),
        (P, jnp.ones(5), shape_of("background", "3", "5")),
    ]:
        yield Bad(smooth, (targets, 0.1), {"background": background}, *error)
    for lam in (1.1, -1e-3, 2, math.nan):
        yield Bad(mix, (LABELS, LABELS, lam), {}, *shape_of("lam", "[0, 1]", str(lam)))
    yield Bad(mix, (LABELS, LABELS, jnp.ones(3)), {}, *shape_of("lam", "(4,)", "[3]"))
    yield Bad(mix, (P, LABELS, jnp.ones((4, 1))), {}, *shape_of("lam", "(4,)", "[4, 1]"))
    yield Bad(mix, (LABELS, LABELS[:2], 0.5), {}, *shape_of("b", "(4,)", "(2,)"))
    yield Bad(mix, (P, LABELS[:2], 0.5), {}, *shape_of("b", "(4,)", "(2,)"))
    yield Bad(mix, (P, jnp.ones((4, 5)), 0.5), {}, *shape_of("b", "3", "5"))
    yield Bad(mix, (P, SMOOTHED, 0.5), {}, *shape_of("b", "3", "5"))
    other = xj.smooth_labels(LABELS, 0.1, background=jnp.ones(3) / 3)
    yield Bad(mix, (other, SMOOTHED, 0.5), {}, *shape_of("b", "3", "5"))
    yield Bad(mix, (bools(4), LABELS, 0.5), {}, *kind_of("a", "integer labels", "bool[4]"))
    yield Bad(mix, (LABELS, bools(4), 0.5), {}, *kind_of("b", "integer labels", "bool[4]"))
    for targets, weights, error in [
        (LABELS, jnp.ones((4, 3)), shape_of("class_weights", "[V]", "[4, 3]")),
        (LABELS, 2.0, shape_of("class_weights", "[V]", "[]")),
        (LABELS, ints(3), kind_of("class_weights", FLOATS, "int32[3]")),
        (P, jnp.ones(5), shape_of("class_weights", "3 classes", "[5]")),
        (SMOOTHED, jnp.ones(3), shape_of("class_weights", "5 classes", "[3]")),
        (LABELS, jnp.ones(0), shape_of("class_weights", "[V]", "[0]")),
        (bools(4), jnp.ones(3), kind_of("targets", "integer labels", "bool[4]")),
    ]:
        yield Bad(xj.reweight_targets, (targets, weights), {}, *error)
    for targets, classes, error in [
        (LABELS, 0, shape_of("num_classes", "positive int", "0")),
        (LABELS, 3.0, kind_of("num_classes", "positive int", "3.0")),
        (P, 5, shape_of("targets", "5 classes", "3")),
        (SMOOTHED, 3, shape_of("targets", "3 classes", "5")),
    ]:
        yield Bad(xj.dense_targets, (targets, classes), {}, *error)


def mixing_calls():
    for function, x in [(xj.mixup, Z), (xj.cutmix, IMAGES)]:
        for alpha in (-1.0, math.nan, math.inf):
            yield Bad(function, (KEY, x, LABELS, alpha), {}, *shape_of("alpha", "", str(alpha)))
        yield Bad(function, (KEY, x, LABELS, LOSSES), {}, *shape_of("alpha", "scalar", "[4]"))
        for alpha in ("dog", None, 1j, True):
            yield Bad(function, (KEY, x, LABELS, alpha), {}, *kind_of("alpha", "real number", ""))
        for key in (None, 0, jnp.zeros(2), "dog"):
            yield Bad(function, (key, x, LABELS, 1.0), {}, *kind_of("key", "PRNG key", ""))
        two = jax.random.split(KEY)
        yield Bad(function, (two, x, LABELS, 1.0), {}, *shape_of("key", "one PRNG key", "(2,)"))
        for where, error in [
            (jnp.ones(4), kind_of("where", "bool", "float32[4]")),
            (bools(3), shape_of("where", "(4,)", "[3]")),
        ]:
            yield Bad(function, (KEY, x, LABELS, 1.0), {"where": where}, *error)
        yield Bad(function, (KEY, x, LABELS[:2], 1.0), {}, *shape_of("targets", "4", "2"))
        yield Bad(function, (KEY, x, bools(4), 1.0), {}, *kind_of("targets", "labels", "bool[4]"))
    pixels = ints(4, 3)
    yield Bad(xj.mixup, (KEY, pixels, LABELS, 1.0), {}, *kind_of("inputs", FLOATS, "int32[4, 3]"))
    yield Bad(xj.cutmix, (KEY, Z, LABELS, 1.0), {}, *shape_of("image_axes", "two axes", "[4, 3]"))
    for axes, error in [
        ((0, 1), shape_of("image_axes", "not the first", "(0, 1)")),
        ((1, -2), shape_of("image_axes", "two axes", "(1, -2)")),
        ((1, 3), shape_of("image_axes", "two axes", "(1, 3)")),
        ((1,), kind_of("image_axes", "two ints", "(1,)")),
        ((1.0, 2.0), kind_of("image_axes", "two ints", "(1.0, 2.0)")),
        (2, kind_of("image_axes", "two ints", "2")),
    ]:
        yield Bad(xj.cutmix, (KEY, IMAGES, LABELS, 1.0), {"image_axes": axes}, *error)
    channels_first = shape_of("image_axes", "(2, 3)", "None")
    yield Bad(xj.cutmix, (KEY, jnp.zeros((4, 3, 8, 8)), LABELS, 1.0), {}, *channels_first)
    maps, mask = ints(4, 8, 8), {"where": bools(4, 8, 8)}
    yield Bad(xj.cutmix, (KEY, IMAGES, maps[:, :4], 1.0), {}, *shape_of("targets", "8", "4, 4, 8"))
    yield Bad(xj.cutmix, (KEY, IMAGES, maps, 1.0), mask, *shape_of("where", "None", "mask"))
    for tree, given in [({"a": Z, "b": Z[:2]}, "(2, 3)"), (jnp.ones(()), "()"), ({}, "none")]:
        yield Bad(xj.mixup, (KEY, tree, LABELS, 1.0), {}, *shape_of("inputs", "", given))


def reduction_calls():
    for function in (xj.weighted_mean, xj.weighted_sum):
        yield Bad(function, (ints(4),), {}, *kind_of("losses", FLOATS, "int32[4]"))
        for name, x, error in [
            ("where", jnp.ones(4), kind_of("where", "bool", "float32[4]")),
            ("where", bools(1), shape_of("where", "(4,)", "[1]")),
            ("where", bools(4, 1), shape_of("where", "(4,)", "[4, 1]")),
            ("weights", 1j * LOSSES, kind_of("weights", "float, int or bool", "complex64[4]")),
            ("weights", jnp.ones(1), shape_of("weights", "(4,)", "[1]")),
            ("weights", 2.0, shape_of("weights", "(4,)", "[]")),
            ("weights", "two", kind_of("weights", "", "'two'")),
            ("axis", 1, shape_of("axis", "[-1, 1)", "1")),
            ("axis", "rows", kind_of("axis", "int", "'rows'")),
        ]:
            yield Bad(function, (LOSSES,), {name: x}, *error)


def information_calls():
    for function, name, x in [
        (xj.surprisal, "p", P),
        (xj.entropy, "p", P),
        (xj.softmax_surprisal, "logits", Z),
        (xj.softmax_entropy, "logits", Z),
        (xj.perplexity, "nats", LOSSES),
    ]:
        yield Bad(function, (ints(4, 3),), {}, *kind_of(name, FLOATS, "int32[4, 3]"))
        for base in () if name == "nats" else (0, 1, -2, math.nan, math.inf):
            yield Bad(function, (x,), {"base": base}, *shape_of("base", "positive", str(base)))
        for base in () if name == "nats" else ("two", 2j, np.ones(1), [2]):
            yield Bad(function, (x,), {"base": base}, *kind_of("base", "positive", repr(base)))
    for function, names, x in [
        (xj.cross_entropy, "pq", P),
        (xj.kl_divergence, "pq", P),
        (xj.js_divergence, "pq", P),
        (xj.softmax_kl_divergence, ("p_logits", "q_logits"), Z),
    ]:
        yield Bad(function, (x, x[:1]), {}, *shape_of(names[1], "(4, 3)", "[1, 3]"))
        yield Bad(function, (x[0], x), {}, *shape_of(names[1], "(3,)", "[4, 3]"))
        yield Bad(function, (ints(4, 3), x), {}, *kind_of(names[0], FLOATS, "int32[4, 3]"))
        yield Bad(function, (x, ints(4, 3)), {}, *kind_of(names[1], FLOATS, "int32[4, 3]"))
        yield Bad(function, (x, x), {"base": -2}, *shape_of("base", "positive", "-2"))
        yield Bad(function, (x, x), {"base": "two"}, *kind_of("base", "positive", "'two'"))
        yield Bad(function, (x, x), {"axis": 2}, *shape_of("axis", "[-2, 2)", "2"))
    kl = xj.softmax_kl_divergence
    yield Bad(kl, (Z, Z), {"where": bools(3)}, *shape_of("where", "(4,)", "(3,)"))
    yield Bad(kl, (Z, Z), {"where": ints(4)}, *kind_of("where", "bool", "int32[4]"))
    for function in (xj.entropy, xj.softmax_entropy, xj.softmax_surprisal):
        yield Bad(function, (Z,), {"axis": (0, 2)}, *shape_of("axis", "[-2, 2)", "(0, 2)"))
        yield Bad(function, (Z,), {"axis": (0, 0)}, *shape_of("axis", "distinct", "(0, 0)"))
        yield Bad(function, (Z,), {"axis": 1.0}, *kind_of("axis", "int", "1.0"))


def linear_calls(function):
    x, w = jnp.zeros((4, 2)), jnp.ones((2, 3))
    for args, error in [
        ((ints(4, 2), w, LABELS), kind_of("inputs", FLOATS, "int32[4, 2]")),
        ((jnp.ones(()), w, LABELS), shape_of("inputs", "[..., D]", "[]")),
        ((x, ints(2, 3), LABELS), kind_of("kernel", FLOATS, "int32[2, 3]")),
        ((x, w.T, LABELS), shape_of("kernel", "2 features", "[3, 2]")),
        ((x, w[0], LABELS), shape_of("kernel", "[D, V]", "[3]")),
        ((x, w[:, :0], LABELS), shape_of("kernel", "at least one class", "[2, 0]")),
        ((x, w, ints(1)), shape_of("targets", "(4,)", "1")),
        ((x, w, jnp.ones((4, 5))), shape_of("targets", "(4, 3)", "[4, 5]")),
        ((x, w, bools(4, 3)), kind_of("targets", "integer labels", "bool[4, 3]")),
    ]:
        yield Bad(function, args, {}, *error)
    for option, error in [
        ({"bias": jnp.ones(4)}, shape_of("bias", "(3,)", "[4]")),
        ({"bias": ints(3)}, kind_of("bias", FLOATS, "int32[3]")),
        ({"class_mask": bools(4)}, shape_of("class_mask", "(3,)", "[4]")),
        ({"class_mask": ints(3)}, kind_of("class_mask", "bool", "int32[3]")),
        ({"class_axis": 2}, shape_of("class_axis", "0", "2")),
        ({"where": bools(4, 3)}, shape_of("where", "(4,)", "[4, 3]")),
        ({"where": ints(4)}, kind_of("where", "bool", "int32[4]")),
        ({"logit_transform": 30.0}, kind_of("logit_transform", "function", "30.0")),
        ({"logit_transform": jnp.sum}, shape_of("logit_transform", "elementwise", "float32[]")),
        ({"memory_budget": -1}, shape_of("memory_budget", "bytes", "-1")),
        (
            {"memory_budget": 1e9},
            kind_of("memory_budget", "integer number of bytes", "1000000000.0"),
        ),
        ({"memory_budget": True}, kind_of("memory_budget", "integer number of bytes", "True")),
        ({"class_axis": 1.0}, kind_of("class_axis", "0 or 1", "1.0")),
        ({"class_axis": True}, kind_of("class_axis", "0 or 1", "True")),
        (
            {"logit_transform": xj.soft_cap},
            kind_of("logit_transform", "elementwise", "soft_cap itself"),
        ),
    ]:
        yield Bad(function, (x, w, LABELS), option, *error)


def linear_options():
    function, args = xj.linear_softmax_cross_entropy, (jnp.zeros((4, 2)), jnp.ones((2, 3)), LABELS)
    yield Bad(function, args, {"reduction": "avg"}, *shape_of("reduction", '"mean"', "'avg'"))
    yield Bad(function, args, {"weights": ints(4)}, *kind_of("weights", FLOATS, "int32[4]"))
    yield Bad(function, args, {"weights": jnp.ones(1)}, *shape_of("weights", "(4,)", "[1]"))
    for value, given in ((-1.0, "-1.0"), (math.nan, "nan"), (jnp.ones(1), "[1]")):
        yield Bad(function, args, {"z_loss": value}, *shape_of("z_loss", "at least 0", given))
    yield Bad(function, args, {"z_loss": "1"}, *kind_of("z_loss", "at least 0", "'1'"))
    x, w = args[:2]
    for targets, error in [
        (xj.LinearTargets(ints(4, 2), w), kind_of("targets.inputs", FLOATS, "int32[4, 2]")),
        (xj.LinearTargets(x, ints(2, 3)), kind_of("targets.kernel", FLOATS, "int32[2, 3]")),
        (xj.LinearTargets(x, w.T), shape_of("targets.kernel", "2 features", "[3, 2]")),
        (xj.LinearTargets(x[:3], w), shape_of("targets", "(4,) tokens", "(3,) tokens")),
        (xj.LinearTargets(x, jnp.ones((2, 5))), shape_of("targets", "3 classes", "5 classes")),
        (
            xj.LinearTargets(x, w, bias=jnp.ones(4)),
            shape_of("targets.bias", "(3,)", "[4]"),
        ),
        (
            xj.LinearTargets(x, w, temperature=0.0),
            shape_of("targets.temperature", "positive number", "0.0"),
        ),
        (xj.LinearTargets(x, w, class_axis=2), shape_of("targets.class_axis", "0", "2")),
    ]:
        yield Bad(function, (x, w, targets), {}, *error)
    for transform, name in [(xj.soft_cap, "cap"), (xj.temperature, "tau")]:
        for value in (0.0, -1.0, math.nan, math.inf):
            yield Bad(transform, (value,), {}, *shape_of(name, "positive number", str(value)))
        yield Bad(transform, (jnp.ones(1),), {}, *shape_of(name, "positive number", "[1]"))
        for value in ("two", None, 2j, True):
            yield Bad(transform, (value,), {}, *kind_of(name, "positive number", repr(value)))


def teacher_calls():
    for k, error in [
        (0, shape_of("k", "[1, 3]", "0")),
        (4, shape_of("k", "[1, 3]", "4")),
        (2.0, kind_of("k", "an int", "2.0")),
        (True, kind_of("k", "an int", "True")),
    ]:
        yield Bad(xj.top_k_targets, (Z, k), {}, *error)
    yield Bad(xj.top_k_targets, (ints(4, 3), 2), {}, *kind_of("logits", FLOATS, "int32[4, 3]"))
    for tail in ("bucket", None, 1):
        options, error = {"tail": tail}, shape_of("tail", '"background"', repr(tail))
        yield Bad(xj.top_k_targets, (Z, 2), options, *error)
        yield Bad(xj.teacher_targets, (ints(4, 2), Z[:, :2]), options, *error)
    for tau, error in [
        (0.0, shape_of("temperature", "positive number", "0.0")),
        (LOSSES, shape_of("temperature", "positive number", "[4]")),
        ("warm", kind_of("temperature", "positive number", "'warm'")),
    ]:
        yield Bad(xj.top_k_targets, (Z, 2), {"temperature": tau}, *error)
    for args, error in [
        ((Z, Z), kind_of("indices", "integers", "float32[4, 3]")),
        ((ints(4, 3), ints(4, 3)), kind_of("log_probabilities", FLOATS, "int32[4, 3]")),
        ((ints(4, 2), Z), shape_of("log_probabilities", "(4, 2)", "[4, 3]")),
        ((ints(4, 0), Z[:, :0]), shape_of("indices", "[..., K]", "[4, 0]")),
    ]:
        yield Bad(xj.teacher_targets, args, {}, *error)
    for args, error in [
        ((ints(4, 3), ints(4, 2)), kind_of("logits", FLOATS, "int32[4, 3]")),
        ((Z, ints(3, 2)), shape_of("indices", "(4, 2)", "[3, 2]")),
        ((Z, ints(4)), shape_of("indices", "(4, 4)", "[4]")),
        ((Z, bools(4, 2)), kind_of("indices", "integers", "bool[4, 2]")),
        ((Z[:, :0], ints(4, 2)), shape_of("logits", "at least one class", "[4, 0]")),
    ]:
        yield Bad(xj.bucket_logits, args, {}, *error)
    x, w, function = jnp.zeros((4, 2)), jnp.ones((2, 3)), xj.linear_bucket_logits
    for args, options, error in [
        ((ints(4, 2), w, K1[0]), {}, kind_of("inputs", FLOATS, "int32[4, 2]")),
        ((x, w.T, K1[0]), {}, shape_of("kernel", "2 features", "[3, 2]")),
        ((x, w, K1[1]), {}, kind_of("indices", "integers", "float32[4, 1]")),
        ((x, w, K1[0][:3]), {}, shape_of("indices", "(4, 1)", "[3, 1]")),
        ((x, w, K1[0][:, :0]), {}, shape_of("indices", "[..., K]", "[4, 0]")),
        ((x, w, K1[0]), {"bias": LOSSES}, shape_of("bias", "(3,)", "[4]")),
        ((x, w, K1[0]), {"class_mask": ints(3)}, kind_of("class_mask", "bool", "int32[3]")),
        ((x, w, K1[0]), {"class_axis": 2}, shape_of("class_axis", "0", "2")),
        ((x, w, K1[0]), {"logit_transform": 2.0}, kind_of("logit_transform", "function", "2.0")),
        ((x, w, K1[0]), {"memory_budget": -1}, shape_of("memory_budget", "bytes", "-1")),
    ]:
        yield Bad(function, args, options, *error)


def contrast_calls():
    for args, options, error in [
        ((ints(4, 3), Z), {}, kind_of("queries", FLOATS, "int32[4, 3]")),
        ((Z[0], Z), {}, shape_of("queries", "[N, D]", "[3]")),
        ((Z, Z[:, :2]), {}, shape_of("keys", "3 features", "[4, 2]")),
        ((Z, Z[:2]), {}, shape_of("keys", "at least 4", "[2, 3]")),
        ((Z[:2], Z), {"symmetric": True}, shape_of("keys", "2 keys", "[4, 3]")),
        ((Z, Z), {"symmetric": 1}, kind_of("symmetric", "True or False", "1")),
        ((Z, Z), {"where": bools(3)}, shape_of("where", "(4,)", "[3]")),
        ((Z, Z), {"where": ints(4)}, kind_of("where", "bool", "int32[4]")),
        ((Z, Z), {"temperature": -1.0}, shape_of("temperature", "positive number", "-1.0")),
    ]:
        yield Bad(xj.info_nce, args, {"temperature": 1.0} | options, *error)
    for function in (xj.nt_xent, xj.supervised_contrastive):
        for args, options, error in [
            ((ints(4, 3), LABELS), {}, kind_of("embeddings", FLOATS, "int32[4, 3]")),
            ((Z[0], LABELS), {}, shape_of("embeddings", "[N, D]", "[3]")),
            ((Z, LABELS[:2]), {}, shape_of("labels", "(4,)", "[2]")),
            ((Z, LOSSES), {}, kind_of("labels", "integer labels", "float32[4]")),
            ((Z, LABELS), {"where": bools(4, 1)}, shape_of("where", "(4,)", "[4, 1]")),
            ((Z, LABELS), {"temperature": 0}, shape_of("temperature", "positive number", "0")),
        ]:
            yield Bad(function, args, {"temperature": 1.0} | options, *error)


def margin_calls():
    for function, name in [(xj.additive_margin, "losses"), (xj.angular_margin, "cosines")]:
        yield Bad(function, (ints(4), 0.5), {}, *kind_of(name, FLOATS, "int32[4]"))
        yield Bad(function, (LOSSES, LOSSES[:2]), {}, *shape_of("margin", "(4,)", "[2]"))
        for margin in (-0.5, math.nan, math.inf):
            yield Bad(function, (LOSSES, margin), {}, *shape_of("margin", "[0, ", str(margin)))
        yield Bad(function, (LOSSES, "wide"), {}, *kind_of("margin", "a real number", "'wide'"))
    yield Bad(xj.angular_margin, (LOSSES, 4.0), {}, *shape_of("margin", "[0, 3.14159]", "4.0"))


BAD = [
    *softmax_calls(xj.softmax_cross_entropy),
    *softmax_calls(xj.softmax_cross_entropy_with_stats),
    *sparse_calls(),
    *linear_calls(xj.linear_softmax_cross_entropy),
    *linear_calls(xj.linear_softmax_cross_entropy_with_stats),
    *linear_options(),
    *sigmoid_calls(),
    *weight_calls(),
    *calibration_calls(),
    *target_calls(),
    *teacher_calls(),
    *contrast_calls(),
    *margin_calls(),
    *mixing_calls(),
    *reduction_calls(),
    *information_calls(),
]


def loss_fn(params, batch):
    return xj.weighted_sum(xj.softmax_cross_entropy(params * batch[0], batch[1]))


KEEP, MASK = bools(4), bools(4, 3)
DEVICES = jax.devices()[:1]
HEAD = {
    "inputs": jnp.zeros((4, 2)),
    "kernel": jnp.ones((2, 3)),
    "targets": LABELS,
    "bias": P[0],
    "class_axis": -1,
    "class_mask": bools(3),
    "where": KEEP,
    "logit_transform": jnp.tanh,
    "memory_budget": 2**20,
}
SOFTMAX = {"logits": Z, "targets": LABELS, "axis": -1, "where": KEEP}
AUGMENTATION = {"targets": LABELS, "alpha": 0.4, "per_example": False, "where": KEEP, "axis": -1}
CONTRAST = {"embeddings": Z, "labels": LABELS, "temperature": 0.5, "where": KEEP}
BINARY = {"logits": Z, "targets": P, "pos_weight": 2.0, "neg_weight": P, "where": MASK}
BINS = {"logits": Z, "targets": LABELS, "num_bins": 5, "axis": -1, "where": KEEP}
PAIR = {"p": P, "q": P, "axis": -1, "base": 2}
BATCHES = {"loss_fn": loss_fn, "microbatches": 2, "has_aux": False}

# A good call of every function, with every argument but `axis_name` that needs a mapped axis.
GOOD = {
    xj.smooth_labels: {"targets": P, "alpha": 0.1, "background": P[0], "axis": -1},
    xj.mix_targets: {"a": LABELS, "b": P, "lam": 0.5, "axis": -1},
    xj.reweight_targets: {"targets": P, "class_weights": P[0], "axis": -1},
    xj.dense_targets: {"targets": P, "num_classes": 3, "axis": -1},
    xj.mixup: {"key": KEY, "inputs": Z} | AUGMENTATION,
    xj.cutmix: {"key": KEY, "images": IMAGES, "image_axes": (1, 2)} | AUGMENTATION,
    xj.softmax_cross_entropy: SOFTMAX,
    xj.softmax_cross_entropy_with_stats: SOFTMAX,
    xj.linear_softmax_cross_entropy: HEAD
    | {"weights": LOSSES, "reduction": "mean", "z_loss": 1e-4},
    xj.linear_softmax_cross_entropy_with_stats: HEAD,
    xj.soft_cap: {"cap": 30.0},
    xj.temperature: {"tau": 2.0},
    xj.sigmoid_binary_cross_entropy: BINARY,
    xj.multilabel_cross_entropy: BINARY | {"axis": -1},
    xj.asymmetric_cross_entropy: {
        "logits": Z,
        "targets": P,
        "gamma_positive": 1.0,
        "gamma_negative": 4.0,
        "margin": 0.05,
        "where": MASK,
    },
    xj.smooth_binary_labels: {"targets": P, "alpha": 0.1},
    xj.class_balanced_weights: {"counts": P[0], "beta": 0.9},
    xj.focal: {"losses": LOSSES, "gamma": 2.0},
    xj.poly1: {"losses": LOSSES, "epsilon": 2.0},
    xj.generalized: {"losses": LOSSES, "q": 0.7},
    xj.fit_temperature: SOFTMAX,
    xj.expected_calibration_error: BINS,
    xj.reliability_bins: BINS,
    xj.brier_score: SOFTMAX,
    xj.softmax_hessian_product: SOFTMAX | {"vectors": Z},
    xj.target_entropy: {"targets": P, "num_classes": 3, "axis": -1, "base": 2},
    xj.target_kl_divergence: SOFTMAX | {"base": 2},
    xj.softmax_js_divergence: {
        "p_logits": Z,
        "q_logits": Z,
        "beta": 0.5,
        "axis": -1,
        "base": 2,
        "where": KEEP,
    },
    xj.binary_cross_entropy: {"probabilities": P, "targets": P, "where": MASK},
    xj.top_k_targets: {"logits": Z, "k": 2, "temperature": 2.0, "tail": "drop"},
    xj.teacher_targets: {"indices": ints(4, 2), "log_probabilities": P[:, :2], "tail": "drop"},
    xj.bucket_logits: {"logits": Z, "indices": ints(4, 2)},
    xj.linear_bucket_logits: {
        k: v for k, v in HEAD.items() if k not in ("targets", "where", "weights", "reduction")
    }
    | {"indices": ints(4, 2)},
    xj.info_nce: {"queries": Z, "keys": P, "temperature": 0.5, "symmetric": True, "where": KEEP},
    xj.nt_xent: CONTRAST,
    xj.supervised_contrastive: CONTRAST,
    xj.additive_margin: {"losses": LOSSES, "margin": 0.5},
    xj.angular_margin: {"cosines": LOSSES, "margin": 0.5},
    xj.weighted_mean: {"losses": LOSSES, "axis": 0, "where": KEEP, "weights": LOSSES},
    xj.weighted_sum: {"losses": LOSSES, "axis": 0, "where": KEEP, "weights": LOSSES},
    xj.per_example: {"loss_fn": loss_fn, "gradients": False, "has_aux": False},
    xj.accumulate_gradients: BATCHES,
    xj.data_parallel: BATCHES | {"mesh": jax.make_mesh((1,), ("data",)), "in_specs": None},
    xj.pmap_data_parallel: BATCHES | {"axis_name": "batch", "devices": DEVICES},
    xj.surprisal: {"p": P, "base": 2},
    xj.entropy: {"p": P, "axis": -1, "base": 2},
    xj.cross_entropy: PAIR,
    xj.kl_divergence: PAIR,
    xj.js_divergence: PAIR,
    xj.perplexity: {"nats": LOSSES},
    xj.softmax_surprisal: {"logits": Z, "axis": -1, "base": 2},
    xj.softmax_entropy: {"logits": Z, "axis": -1, "base": 2, "where": KEEP},
    xj.softmax_kl_divergence: {
        "p_logits": Z,
        "q_logits": Z,
        "axis": -1,
        "base": 2,
        "where": KEEP,
    },
}
# Values that no argument takes, and values of a shape that none of those above has.
ODD_KINDS = {
    "text": "dog",
    "object": object(),
    "dict": {"a": "b"},
    "ragged": [[1], [1, 2]],
    "large": [1, 2**40],
    "texts": np.array(["a"]),
    "objects": np.array([object()]),
    "slice": slice(None),
}
ODD_SHAPES = {
    "floats": jnp.ones((7, 7, 7)),
    "ints": ints(7, 1),
    "bools": bools(2, 2),
    "complex": Z.astype(complex)[:, :2],
    "float8": Z.astype(jnp.float8_e4m3fn)[:, :2],
    "number": 1j,
    "nan": math.nan,
    "negative": -3,
}
