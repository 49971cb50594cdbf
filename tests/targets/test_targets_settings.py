"""Functions of targets under the settings of JAX: switches, meshes, export, and compiling once."""

import contextlib
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import jit, mainly, target_forms
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import AUTO, EXPLICIT, make_mesh

import xentjax
from xentjax import SparseTargets

BATCH, CLASSES = 8, 5
KEY = jax.random.key(3)
PRIOR = np.arange(1, 6, dtype=np.float32) / 15
LAM = np.linspace(0, 1, BATCH, dtype=np.float32)
OTHER = np.arange(BATCH, dtype=np.int32)[::-1] % CLASSES
IMAGES = np.random.default_rng(0).random((BATCH, 4, 3, 2)).astype(np.float32)
FORMS = ["labels", "dense", "smoothed", "two backgrounds"]

# Targets, and what else is of the batch: images, labels and shares.
FUNCTIONS = {
    "smooth": lambda t, *_: xentjax.smooth_labels(t, 0.1),
    "smooth to a prior": lambda t, *_: xentjax.smooth_labels(t, 0.1, background=PRIOR),
    "reweight": lambda t, *_: xentjax.reweight_targets(t, PRIOR),
    "write out": lambda t, *_: xentjax.dense_targets(t, CLASSES),
    "mix": lambda t, _, other, lam: xentjax.mix_targets(t, other, lam),
    "mix with dense": lambda t, _, other, lam: xentjax.mix_targets(
        jax.nn.one_hot(other, CLASSES, dtype=jnp.float32), t, 0.2
    ),
    "mixup": lambda t, x, other, _: xentjax.mixup(KEY, x, t, 0.5, where=other > 0),
    "cutmix": lambda t, x, other, _: xentjax.cutmix(KEY, x, t, 0.5, where=other > 0),
}
MIXERS = ["mixup", "cutmix"]
EACH_FUNCTION = pytest.mark.parametrize("function", FUNCTIONS)


@functools.cache
def form(name):
    """Returns the targets in float32, on any device."""
    return jax.tree.map(
        lambda x: np.asarray(x, {"f": np.float32}.get(x.dtype.kind)),
        target_forms(BATCH, CLASSES)[name],
    )


def forms_for(function):
    """Returns the forms to try: those that take another road; mixers take long to compile."""
    return ["dense", "two backgrounds"] if function in MIXERS else FORMS


def arguments(name):
    return form(name), IMAGES, OTHER, LAM


def compiled(function):
    """Returns a function as one program, which is quick to compile."""
    return jit(FUNCTIONS[function])


@functools.cache
def plain_result(function, name):
    return jax.tree.map(np.asarray, compiled(function)(*arguments(name)))


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


@contextlib.contextmanager
def switches(x64):
    with (
        jax.enable_x64(x64),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        yield


@EACH_FUNCTION
def test_float32_comes_out_whatever_the_switches(function):
    """Under 64 bits, and strict promotion; labels alone have no dtype but JAX's default one."""

    def narrow(x):
        return x.astype(jnp.float32) if x.dtype == jnp.float64 else x

    for name in forms_for(function):
        args, want = arguments(name), plain_result(function, name)
        with switches(True):
            got = compiled(function)(*args)
            if name == "labels":
                got = jax.tree.map(narrow, got)
            assert_same(got, want)


@EACH_FUNCTION
def test_half_precision_comes_out_as_float32(function):
    """The arithmetic is that of float32 on the same numbers."""
    dense, *rest = arguments("dense")
    for dtype in [jnp.bfloat16] if function in MIXERS else [jnp.bfloat16, jnp.float16]:
        half = jnp.asarray(dense, dtype)
        want = compiled(function)(half.astype(jnp.float32), *rest)
        with switches(False):
            assert_same(compiled(function)(half, *rest), want)


def test_float64_comes_out_where_some_mass_is_float64():
    with switches(True):
        dense = jnp.full((2, CLASSES), 0.2)
        labels, prior = jnp.array([0, 1]), jnp.full(CLASSES, 0.2)
        for targets in (
            xentjax.smooth_labels(dense, 0.1),
            xentjax.smooth_labels(labels, 0.1, background=prior),
            xentjax.reweight_targets(labels, prior),
            xentjax.mix_targets(labels, labels, jnp.array([0.1, 0.2])),
        ):
            assert jax.tree.leaves(targets)[-1].dtype == jnp.float64
            assert xentjax.dense_targets(targets, CLASSES).dtype == jnp.float64


@EACH_FUNCTION
def test_an_empty_batch(function):
    empty = jax.tree.map(lambda x: x[:0] if len(x) == BATCH else x, form("prior"))
    arrays = (x[:0] for x in arguments("prior")[1:])
    with switches(False):
        got = compiled(function)(empty, *arrays)
    want = plain_result(function, "prior")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == (tuple(0 if n == BATCH else n for n in b.shape))


@pytest.mark.parametrize("axis_type", mainly([AUTO, EXPLICIT], EXPLICIT), ids=str)
@EACH_FUNCTION
def test_a_batch_split_over_devices(function, axis_type):
    mesh = make_mesh((4,), ("data",), axis_type)

    def put(x):
        is_batch = x.ndim > 0 and x.shape[0] == BATCH
        return jax.device_put(x, NamedSharding(mesh, P("data") if is_batch else P()))

    with jax.set_mesh(mesh):
        for name in forms_for(function)[-2 if axis_type == EXPLICIT else -1 :]:
            got = compiled(function)(*jax.tree.map(put, arguments(name)))
            assert_same(got, plain_result(function, name))
            if axis_type == EXPLICIT:
                for x in jax.tree.leaves(got):
                    assert x.shape[0] != BATCH or jax.typeof(x).sharding.spec[0] == "data"


@pytest.mark.parametrize("function", mainly(FUNCTIONS, "mix", "mixup"))
def test_exported_with_a_symbolic_batch(function):
    (batch,) = jax.export.symbolic_shape("batch")

    def symbolic(x):
        shape = (batch, *x.shape[1:]) if x.shape[:1] == (BATCH,) else x.shape
        return jax.ShapeDtypeStruct(shape, x.dtype)

    for name in ["two backgrounds"] if function in MIXERS else ["labels", "two backgrounds"]:
        args = arguments(name)
        exported = jax.export.export(jax.jit(FUNCTIONS[function]))(*jax.tree.map(symbolic, args))
        leaves = jax.tree.leaves(exported.call(*args))
        for a, b in zip(leaves, jax.tree.leaves(plain_result(function, name)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "function", ["smooth", "smooth to a prior", "reweight", "write out", "mix"]
)
def test_each_example_by_vmap_and_scan(function):
    """A function of one example is that of the batch, cut."""
    for name in ("smoothed", "dense"):
        targets, _, other, lam = arguments(name)

        def loss(t, other, lam, function=FUNCTIONS[function]):
            z = jnp.arange(CLASSES, dtype=jnp.float32)
            t = function(t, None, other, lam)
            return xentjax.softmax_cross_entropy(jnp.tile(z, (*np.shape(other), 1)), t)

        want = jit(loss)(targets, other, lam)
        got = jit(jax.vmap(loss))(targets, other, lam)
        np.testing.assert_allclose(got, want, rtol=2e-6)
        scanned = jit(lambda *args: jax.lax.map(lambda one: loss(*one), args))(targets, other, lam)
        np.testing.assert_allclose(scanned, want, rtol=2e-6)


@pytest.mark.parametrize("function", [*FUNCTIONS][:3] + MIXERS)
def test_no_nan_is_made_of_ignored_labels(function):
    labels = jnp.asarray(np.where(OTHER > 0, OTHER, -100))
    logits = jnp.asarray(IMAGES.reshape(BATCH, -1)[:, :CLASSES])
    with jax.debug_nans(True):
        targets = FUNCTIONS[function](labels, IMAGES, OTHER, LAM)
        targets = targets[1] if isinstance(targets, tuple) else targets
        assert isinstance(targets, SparseTargets)
        losses = xentjax.softmax_cross_entropy(logits, targets, where=labels >= 0)
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("function", mainly(FUNCTIONS, "reweight", "mixup"))
def test_a_second_call_compiles_nothing(function, caplog):
    args = arguments("two backgrounds")
    FUNCTIONS[function](*args)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        FUNCTIONS[function](*args)
        assert not [r for r in caplog.records if "ompil" in r.getMessage()]
        jax.jit(lambda x: x + 1)(1)  # The log does tell.
    assert [r for r in caplog.records if "ompil" in r.getMessage()]
