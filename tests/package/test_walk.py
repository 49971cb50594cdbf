"""Every public function under every setting of JAX, with its gradient: one table, many walks.

Functions of targets have more of it in targets/test_targets_settings.py.
"""

import contextlib
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import jit, mainly, target_forms
from compilations import no_compilation
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import AUTO, EXPLICIT, make_mesh

import xentjax as xj

BATCH, CLASSES = 8, 8
RNG = np.random.default_rng(0)


def float32(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@functools.cache
def form(name, batch=BATCH, num_classes=CLASSES):
    """Returns the targets in float32, on any device."""
    return jax.tree.map(
        lambda x: np.asarray(x, {"f": np.float32, "i": np.int32}.get(x.dtype.kind)),
        target_forms(batch, num_classes)[name],
    )


Z, X, KERNEL, BIAS = float32(BATCH, CLASSES), float32(BATCH, 4), float32(4, CLASSES), float32(8)
KEEP = np.arange(BATCH) % 3 > 0
KEY = jax.random.key(0)


def p(z):
    return jax.nn.softmax(z, axis=-1)


def of_head(x, targets, keep, **options):
    """The head under a bias, a soft cap and a mask."""
    kernel, bias = (jnp.asarray(a, x.dtype) for a in (KERNEL, BIAS))
    options = {"logit_transform": xj.soft_cap(5.0), "where": keep, "z_loss": 0.1} | options
    options |= {"class_mask": jnp.arange(CLASSES) < CLASSES + 1}
    return xj.linear_softmax_cross_entropy(x[:, :4], kernel, targets, bias=bias, **options)


def head_stats(x, targets, keep):
    kernel = jnp.asarray(KERNEL, x.dtype)
    return xj.linear_softmax_cross_entropy_with_stats(x[:, :4], kernel, targets, where=keep)


def with_z_loss(losses, stats):
    """A z-loss and the entropy."""
    return losses + stats.log_normalizer**2 + stats.entropy


def sparse(targets):
    """Functions of targets that are made on the way to a loss."""
    return lambda z, t, keep: xj.softmax_cross_entropy(z, targets(t, z), where=keep)


def cutmix(z, targets, keep):
    """Images of 2 by 2 pixels, of 8 channels each."""
    images = jnp.stack([jnp.stack([z, z], axis=1)] * 2, axis=1)
    images, targets = xj.cutmix(KEY, images, targets, 0.4, image_axes=(1, 2))
    return xj.softmax_cross_entropy(images[:, 0, 0], targets)


def best_classes(z):
    """Four classes of each example, the largest logit's first."""
    return jnp.stack([(jnp.argmax(z, axis=-1) + k) % CLASSES for k in range(4)], axis=-1)


def rowwise(function):
    """Functions of one or two arrays of the batch, without targets."""
    two = "q" in inspect.signature(function).parameters
    return lambda z, t, keep: function(p(z), p(z[::-1])) if two else function(p(z))


# (logits float[N, 8], targets, mask of examples) -> losses [N], or a scalar.
FUNCTIONS = {
    "softmax_cross_entropy": lambda z, t, keep: xj.softmax_cross_entropy(z, t, where=keep),
    "softmax_cross_entropy of a class mask": lambda z, t, keep: xj.softmax_cross_entropy(
        z, t, where=jnp.stack([keep] * CLASSES, axis=-1)
    ),
    "softmax_cross_entropy_with_stats": lambda z, t, keep: with_z_loss(
        *xj.softmax_cross_entropy_with_stats(z, t, where=keep)
    ),
    "linear_softmax_cross_entropy": of_head,
    "linear_softmax_cross_entropy recomputed": functools.partial(
        of_head, memory_budget=0, reduction="none"
    ),
    "linear_softmax_cross_entropy of a teacher": lambda z, t, keep: of_head(
        z, xj.LinearTargets(z[:, 4:], KERNEL.astype(z.dtype)[::-1], bias=Z[0, :]), keep
    ),
    "linear_softmax_cross_entropy_with_stats": lambda z, t, keep: with_z_loss(
        *head_stats(z, t, keep)
    ),
    "smooth_labels": sparse(lambda t, z: xj.smooth_labels(t, 0.1)),
    "mix_targets": sparse(lambda t, z: xj.mix_targets(t, t, 0.25)),
    "reweight_targets": sparse(lambda t, z: xj.reweight_targets(t, BIAS**2)),
    "dense_targets": sparse(lambda t, z: xj.dense_targets(t, CLASSES)),
    "mixup": lambda z, t, keep: xj.softmax_cross_entropy(*xj.mixup(KEY, z, t, 0.4)),
    "cutmix": cutmix,
    "soft_cap": lambda z, t, keep: xj.soft_cap(3.0)(z),
    "temperature": lambda z, t, keep: xj.temperature(3.0)(z),
    "sigmoid_binary_cross_entropy": lambda z, t, keep: xj.sigmoid_binary_cross_entropy(
        z, (z > 0), where=jnp.stack([keep] * CLASSES, axis=-1)
    ),
    "sigmoid_binary_cross_entropy of weights": lambda z, t, keep: xj.sigmoid_binary_cross_entropy(
        z, p(z), pos_weight=BIAS**2, neg_weight=2
    ),
    "asymmetric_cross_entropy": lambda z, t, keep: xj.asymmetric_cross_entropy(
        z, z > 0, 1.0, 4.0, 0.05, where=jnp.stack([keep] * CLASSES, axis=-1)
    ),
    "smooth_binary_labels": lambda z, t, keep: xj.smooth_binary_labels(p(z), 0.1),
    "class_balanced_weights": lambda z, t, keep: xj.class_balanced_weights((z**2).sum(0), 0.9),
    "focal": lambda z, t, keep: xj.focal(xj.softmax_cross_entropy(z, t, where=keep), 1.5),
    "poly1": lambda z, t, keep: xj.poly1(xj.softmax_cross_entropy(z, t, where=keep), 2.0),
    "generalized": lambda z, t, keep: xj.generalized(
        xj.softmax_cross_entropy(z, t, where=keep), 0.7
    ),
    "fit_temperature": lambda z, t, keep: xj.fit_temperature(z, t, where=keep),
    "expected_calibration_error": lambda z, t, keep: xj.expected_calibration_error(
        z, t, num_bins=4, where=keep
    ),
    "reliability_bins": lambda z, t, keep: jnp.stack(
        xj.reliability_bins(z, t, num_bins=4, where=keep)
    ),
    "brier_score": lambda z, t, keep: xj.brier_score(z, t, where=keep),
    "softmax_hessian_product": lambda z, t, keep: xj.softmax_hessian_product(
        z, t, z[::-1], where=keep
    ),
    "multilabel_cross_entropy": lambda z, t, keep: xj.multilabel_cross_entropy(z, p(z), where=keep),
    "binary_cross_entropy": lambda z, t, keep: xj.binary_cross_entropy(p(z), z > 0),
    "top_k_targets": lambda z, t, keep: (
        xj.top_k_targets(z, 3, temperature=2.0, tail="background").weights
    ),
    "teacher_targets": lambda z, t, keep: (
        xj.teacher_targets(best_classes(z), z[:, :4] - 8, tail="background").weights
    ),
    "bucket_logits": lambda z, t, keep: xj.bucket_logits(z, best_classes(z)),
    "linear_bucket_logits": lambda z, t, keep: xj.linear_bucket_logits(
        z[:, :4], jnp.asarray(KERNEL, z.dtype), best_classes(z), memory_budget=0
    ),
    "info_nce": lambda z, t, keep: xj.info_nce(z, 2 * z, temperature=2.0, where=keep),
    "nt_xent": lambda z, t, keep: xj.nt_xent(z, t, temperature=2.0, where=keep),
    "supervised_contrastive": lambda z, t, keep: xj.supervised_contrastive(
        z, t, temperature=2.0, where=keep
    ),
    "additive_margin": lambda z, t, keep: xj.additive_margin(xj.softmax_cross_entropy(z, t), 0.5),
    "angular_margin": lambda z, t, keep: xj.angular_margin(jnp.cos(z), 0.5),
    "weighted_mean": lambda z, t, keep: xj.weighted_mean(
        xj.softmax_cross_entropy(z, t), where=keep
    ),
    "weighted_sum": lambda z, t, keep: xj.weighted_sum(
        xj.softmax_cross_entropy(z, t), where=keep
    ).mean(),
    "surprisal": rowwise(xj.surprisal),
    "entropy": rowwise(xj.entropy),
    "cross_entropy": rowwise(xj.cross_entropy),
    "kl_divergence": rowwise(xj.kl_divergence),
    "js_divergence": rowwise(xj.js_divergence),
    "perplexity": lambda z, t, keep: xj.perplexity(xj.softmax_cross_entropy(z, t)),
    "softmax_surprisal": rowwise(xj.softmax_surprisal),
    "softmax_entropy": lambda z, t, keep: xj.softmax_entropy(z, where=keep),
    "softmax_kl_divergence": lambda z, t, keep: xj.softmax_kl_divergence(z, 2 * z, where=keep),
    "softmax_js_divergence": lambda z, t, keep: xj.softmax_js_divergence(
        z, 2 * z, beta=0.25, where=keep
    ),
    "target_entropy": lambda z, t, keep: xj.target_entropy(xj.mix_targets(t, p(z), 0.5), CLASSES),
    "target_entropy of weighted labels": lambda z, t, keep: xj.target_entropy(
        xj.reweight_targets(xj.smooth_labels(t, jnp.asarray(0.1, z.dtype)), (z**2).sum(0)), CLASSES
    ),
    "target_kl_divergence": lambda z, t, keep: xj.target_kl_divergence(z, t, where=keep),
}
TRANSFORMS = {
    "soft_cap",
    "temperature",
    "softmax_hessian_product",
}  # They keep the dtype of their argument.
LOSSES = [n for n in FUNCTIONS if "softmax_cross_entropy" in n and "teacher" not in n]
FORMS = ["labels", "dense", "smoothed", "prior", "two backgrounds", "teacher"]
CASES = [(name, "labels") for name in FUNCTIONS] + [
    (name, form) for name in LOSSES for form in FORMS[1:]
]
# Each function with labels, and each loss with one more form: the forms go round.
CORE = [(name, "labels") for name in FUNCTIONS] + [
    (name, FORMS[1 + i % 5]) for i, name in enumerate(LOSSES)
]
CORE_OF_LOSSES = CORE[len(FUNCTIONS) :]
OF_LOSSES = [(name, form) for name in LOSSES for form in FORMS]


def test_every_public_function_is_walked():
    names = {name for name in xj.__all__ if inspect.isfunction(getattr(xj, name))}
    elsewhere = {"value_checks", "explain", "per_example", "accumulate_gradients"} | {
        name for name in names if "parallel" in name
    }
    assert {name.split(" ")[0] for name in FUNCTIONS} == names - elsewhere


def value_and_gradient(name):
    """Returns (the result, the gradient of its sum), as a function of (logits, targets, mask)."""

    def total(z, targets, keep):
        out = FUNCTIONS[name](z, targets, keep)
        return jnp.sum(out), out

    def both(z, targets, keep):
        (_, out), gradient = jax.value_and_grad(total, has_aux=True)(z, targets, keep)
        return out, gradient

    return both


@functools.cache
def plain_result(name, form_name):
    answer = jit(value_and_gradient(name))(Z, form(form_name), KEEP)
    return jax.tree.map(np.asarray, answer)


def assert_same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


@contextlib.contextmanager
def strictly(x64):
    with (
        jax.enable_x64(x64),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        yield


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_is_float32_under_x64_and_strict_promotion(case):
    name, form_name = case
    with strictly(x64=True):
        out = jax.eval_shape(value_and_gradient(name), Z, form(form_name), KEEP)
    assert {x.dtype for x in jax.tree.leaves(out)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("case", mainly(CASES, *CORE_OF_LOSSES), ids=str)
def test_numbers_are_the_same_under_x64_and_strict_promotion(case):
    name, form_name = case
    want = plain_result(name, form_name)
    assert {x.dtype for x in jax.tree.leaves(want)} == {np.dtype(np.float32)}
    with strictly(x64=True):
        assert_same(jit(value_and_gradient(name))(Z, form(form_name), KEEP), want)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_half_precision_is_computed_in_float32_under_strict_promotion(name):
    for x64, dtype in ((False, jnp.bfloat16), (True, jnp.float16)):
        with strictly(x64):
            z = jnp.asarray(Z, dtype)
            function = value_and_gradient(name)
            losses, gradient = jax.eval_shape(function, z, form("labels"), KEEP)
        assert losses.dtype == (dtype if name in TRANSFORMS else np.float32)
        assert gradient.dtype == dtype


def mean_by_scan(losses):
    """Returns the mean, whose sum begins as `WeightedSum.zero()` does."""

    def step(total, loss):
        return total + xj.weighted_sum(loss[None]), None

    return jax.lax.scan(step, xj.WeightedSum.zero(), losses)[0].mean()


LARGE = {
    # Row blocks, whole arrays, and the plain code of a loop that has all of them.
    "labels": (FUNCTIONS["softmax_cross_entropy_with_stats"], 1000),
    "dense": (FUNCTIONS["softmax_cross_entropy_with_stats"], 1000),
    "two backgrounds": (FUNCTIONS["softmax_cross_entropy_with_stats"], 1000),
    "teacher": (FUNCTIONS["softmax_cross_entropy"], 1000),
}


@pytest.mark.parametrize(
    "dtype", mainly([jnp.float32, jnp.bfloat16, jnp.float16], jnp.float32, jnp.bfloat16)
)
@pytest.mark.parametrize("form_name", mainly(LARGE, "labels", "two backgrounds"))
def test_large_arrays_keep_their_dtype_under_x64(form_name, dtype):
    """Every path of one CPU is traced; nothing is compiled."""
    function, num_classes = LARGE[form_name]
    for batch in (20, 525, 9000):
        with strictly(x64=True):
            targets, keep = form(form_name, batch, num_classes), np.ones(batch, bool)
            z = jax.ShapeDtypeStruct((batch, num_classes), dtype)

            def total(z, targets, keep):
                losses = function(z, targets, keep)
                return mean_by_scan(losses), losses

            both = jax.value_and_grad(total, has_aux=True)
            (mean, losses), gradient = jax.jit(both).lower(z, targets, keep).out_info
            value, _ = jax.jit(total).lower(z, targets, keep).out_info
        assert {x.dtype for x in (mean, losses, value)} == {np.dtype(np.float32)}
        assert gradient.dtype == dtype


@pytest.mark.parametrize(
    "case",
    mainly(
        [
            (*case, axis_type, spec)
            for case in CASES
            for axis_type in (EXPLICIT, AUTO)
            for spec in (P("data"), P("data", "model"))
        ],
        *[(*case, EXPLICIT, spec) for case in CORE for spec in (P("data"), P("data", "model"))],
        *[(*case, AUTO, P("data")) for case in CORE_OF_LOSSES[::2]],  # XLA alone splits these.
    ),
    ids=str,
)
def test_arrays_split_over_devices(case):
    """The batch, and the classes too."""
    name, form_name, axis_type, spec = case
    mesh = make_mesh((2, 4), ("data", "model"), axis_type)

    def place(x):
        own = spec if np.shape(x) == (BATCH, CLASSES) else spec[:1] * (np.shape(x)[:1] == (BATCH,))
        return jax.device_put(jnp.asarray(x), NamedSharding(mesh, P(*own)))

    with jax.set_mesh(mesh):
        args = jax.tree.map(place, (Z, form(form_name), KEEP))
        answer = jit(value_and_gradient(name))(*args)
    assert_same(answer, plain_result(name, form_name))
    if axis_type == EXPLICIT:  # Each example stays on its devices, and its gradient is split as it.
        losses, gradient = answer
        assert gradient.sharding.spec == P(*spec, *[None] * (2 - len(spec)))
        if jnp.shape(losses) == (BATCH,) and name != "class_balanced_weights":  # One per class.
            assert losses.sharding.spec == P("data")


@pytest.mark.parametrize(
    "case",
    mainly(
        [(*case, dtype) for case in CASES for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)],
        *[(*case, jnp.bfloat16) for case in CORE],
        *[(*case, jnp.float32) for case in CORE_OF_LOSSES],
    ),
    ids=str,
)
def test_an_empty_batch(case):
    name, form_name, dtype = case
    empty = jax.tree.map(lambda x: x[:0] if np.shape(x)[:1] == (BATCH,) else x, form(form_name))
    z = jnp.zeros((0, CLASSES), dtype)
    if dtype == jnp.float32:
        losses, gradient = jit(value_and_gradient(name))(z, empty, KEEP[:0])
        assert not np.isnan(losses).any()
    else:  # What fails is the tracing.
        function = jax.jit(value_and_gradient(name))
        losses, gradient = function.lower(z, empty, KEEP[:0]).out_info
    assert losses.dtype == (dtype if name in TRANSFORMS else np.float32)
    assert (gradient.shape, gradient.dtype) == (z.shape, dtype)


@pytest.mark.parametrize(
    "case",
    mainly(
        [(name, "labels") for name in FUNCTIONS] + [(name, "prior") for name in LOSSES],
        *[(name, "labels") for name in LOSSES if "stats" not in name],
        ("softmax_cross_entropy", "prior"),
        ("weighted_mean", "labels"),
    ),
    ids=str,
)
def test_a_second_eager_call_compiles_nothing(case):
    name, form_name = case
    args = jax.tree.map(jnp.asarray, (Z, form(form_name), KEEP))

    def call():
        jax.block_until_ready((FUNCTIONS[name](*args), value_and_gradient(name)(*args)))

    call()
    with no_compilation():
        call()


PLATFORMS = ("cpu", "cuda", "tpu", "rocm")


@pytest.mark.parametrize("case", mainly(CASES, *CORE), ids=str)
def test_export_of_a_batch_of_any_size(case):
    """One artefact for four platforms; here it is run on the first."""
    name, form_name = case
    (batch,) = export.symbolic_shape("batch")
    symbolic = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (batch, *x.shape[1:]) if x.shape[:1] == (BATCH,) else x.shape, x.dtype
        ),
        (Z, form(form_name), KEEP),
    )
    to_export = export.export(jit(value_and_gradient(name)), platforms=PLATFORMS)
    if name == "info_nce":  # Keys are its classes.
        with pytest.raises(ValueError, match="keys: expected a known number of rows, got batch"):
            to_export(*symbolic)
        return
    exported = to_export(*symbolic)
    assert exported.platforms == PLATFORMS
    got, want = exported.call(Z, form(form_name), KEEP), plain_result(name, form_name)
    assert_same(got, want)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), got, want)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("form_name", mainly(["labels", "smoothed"], "smoothed"))
def test_debug_nans_finds_none_behind_a_mask(name, form_name):
    labels = jnp.where(KEEP, form("labels"), -100)
    targets = labels if form_name == "labels" else xj.smooth_labels(labels, 0.1)
    targets = xj.reweight_targets(targets, jnp.ones(CLASSES))
    with jax.debug_nans(True):
        losses, gradient = value_and_gradient(name)(Z, targets, KEEP)
    assert np.isfinite(losses).all()
    assert not gradient[~KEEP].any()


FROM_LOGITS = [
    "softmax_cross_entropy",
    "smooth_labels",
    "mix_targets",
    "reweight_targets",
    "dense_targets",
    "sigmoid_binary_cross_entropy",
    "asymmetric_cross_entropy",
    "focal",
    "poly1",
    "generalized",
    "additive_margin",
    "softmax_entropy",
    "softmax_kl_divergence",
    "softmax_js_divergence",
    "target_kl_divergence",
]


OF_LOGITS = [(name, "labels") for name in FROM_LOGITS] + [
    ("softmax_cross_entropy", name) for name in FORMS[1:]
]


def in_a_loop(function):
    """In a scan of a vmap, of one batch."""

    def looped(z, targets):
        each = jax.vmap(function, in_axes=(0, None))
        out = jax.lax.map(lambda z: each(z, targets), z[None, None])
        return jax.tree.map(lambda x: x[0, 0], out)

    return jit(looped)


WAYS = {
    "loop": (in_a_loop, jnp.float32, False),
    "jit": (jit, jnp.float32, False),
    "jit, bfloat16": (jit, jnp.bfloat16, False),
    "jit, float16, strict, x64": (jit, jnp.float16, True),
    "eager, strict, x64": (lambda f: f, jnp.float32, True),
}


@pytest.mark.parametrize("way", mainly(WAYS, "jit", "jit, float16, strict, x64"))
@pytest.mark.parametrize("case", OF_LOGITS, ids=str)
def test_nan_logits_that_the_mean_masks_have_the_gradient_0(case, way):
    (name, form_name), (compiled, dtype, is_strict) = case, WAYS[way]
    t, every = form(form_name), np.ones(BATCH, bool)

    def mean(z, t):
        losses = FUNCTIONS[name](z, t, every)
        where = KEEP.reshape((BATCH,) + (1,) * (losses.ndim - 1))
        return xj.weighted_mean(losses, where=jnp.broadcast_to(where, losses.shape))

    spoiled = Z.copy()
    spoiled[~KEEP, 1] = np.nan
    spoiled[0] = np.nan
    bad = [(spoiled, t)]
    if form_name == "labels":
        bad.append((Z, np.where(KEEP, t, -100).astype(np.int32)))
    with strictly(x64=True) if is_strict else contextlib.nullcontext():
        function = compiled(jax.value_and_grad(mean))
        want, gradient_of_rest = function(jnp.asarray(Z, dtype), t)
        for z, targets in bad:
            value, gradient = function(jnp.asarray(z, dtype), targets)
            assert value == want
            np.testing.assert_array_equal(gradient[KEEP], gradient_of_rest[KEEP])
            np.testing.assert_array_equal(gradient[~KEEP], 0)


MASKED_INSIDE = {"linear_softmax_cross_entropy", "softmax_cross_entropy of a class mask"}


@pytest.mark.parametrize(
    "case",
    mainly(
        [case for case in OF_LOSSES if case[0] not in MASKED_INSIDE],
        *[case for case in CORE_OF_LOSSES if case[0] not in MASKED_INSIDE],
        ("softmax_cross_entropy_with_stats", "labels"),
        ("softmax_cross_entropy_with_stats", "dense"),
    ),
    ids=str,
)
def test_a_row_with_a_cotangent_of_0_has_the_gradient_0(case):
    """Whatever is in it: the mask was given to the mean alone."""
    name, form_name = case
    t, z = form(form_name), Z.copy()
    if form_name == "labels":
        t = np.where(KEEP, t, -100).astype(np.int32)
    elif form_name == "dense":
        t = np.where(KEEP[:, None], t, np.nan).astype(np.float32)

    def mean(z):
        return xj.weighted_mean(FUNCTIONS[name](z, t, np.ones(BATCH, bool)), where=KEEP)

    def of_rows(z):
        rows = jax.tree.map(lambda x: x[KEEP] if np.shape(x)[:1] == (BATCH,) else x, t)
        return FUNCTIONS[name](z[KEEP], rows, np.ones(KEEP.sum(), bool)).mean()

    actual, desired = (jit(jax.value_and_grad(f))(z) for f in (mean, of_rows))
    assert_same(actual, desired)
    np.testing.assert_array_equal(actual[1][~KEEP], 0)
