"""The package: what importing it costs, what it exports, and that every loss can be exported."""

import contextlib
import functools
import importlib.metadata
import importlib.resources
import inspect
import re
import subprocess
import sys
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import xentjax

PUBLIC = {name: getattr(xentjax, name) for name in xentjax.__all__}
FUNCTIONS = {name: f for name, f in PUBLIC.items() if inspect.isfunction(f)}
CLASSES = {name: c for name, c in PUBLIC.items() if inspect.isclass(c)}


# Importing.

IMPORT = """
import sys
import jax
before = set(sys.modules)
import xentjax
print(*sorted({m.split(".")[0] for m in set(sys.modules) - before}))
"""


def test_import_brings_no_more_than_it_needs():
    command = [sys.executable, "-c", IMPORT]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    brought = set(run.stdout.split())
    assert "chex" in brought
    assert not brought & {"optax", "matplotlib", "sklearn", "torch", "rich", "scipy", "pandas"}


# What is public.


def test_all_is_what_is_there():
    assert len(set(xentjax.__all__)) == len(xentjax.__all__)
    there = {
        name
        for name, value in vars(xentjax).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert set(xentjax.__all__) == there
    namespace = {}
    exec("from xentjax import *", namespace)
    assert set(xentjax.__all__) <= set(namespace)


def test_public_names_are_functions_classes_and_one_alias():
    assert set(PUBLIC) - set(FUNCTIONS) - set(CLASSES) == {"Targets"}


HEADING = re.compile(r"^(Args|Attributes|Returns|Raises|Example|Source):\n", re.MULTILINE)


def sections_of(thing):
    """Returns a docstring's sections by name; the text before the first is that of ""."""
    first, *rest = HEADING.split(inspect.getdoc(thing) or "")
    return {"": first} | dict(zip(rest[::2], rest[1::2], strict=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_says_what_it_takes_and_shows_how(name):
    sections = sections_of(FUNCTIONS[name])
    assert sections[""].splitlines()[0].endswith(".")
    assert f"xentjax.{name}(" in sections["Example"]
    assert ">>> " in sections["Example"]
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    if parameters:
        described = re.findall(r"^  (\w+): ", sections["Args"], flags=re.MULTILINE)
        assert described == list(parameters)
        assert "Returns" in sections
        assert "Raises" in sections
        assert set(typing.get_type_hints(FUNCTIONS[name])) == {*parameters, "return"}


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_describes_its_parts(name):
    sections = sections_of(CLASSES[name])
    described = re.findall(r"^  (\w+): ", sections["Attributes"], flags=re.MULTILINE)
    assert described == list(CLASSES[name].__annotations__)
    if not hasattr(CLASSES[name], "_fields"):  # What functions return is shown by theirs.
        assert ">>> import xentjax" in sections["Example"]
    for method, value in vars(CLASSES[name]).items():
        if inspect.isfunction(value) and not method.startswith("_"):
            assert value.__doc__, method


def test_types_are_shipped():
    assert importlib.resources.files("xentjax").joinpath("py.typed").is_file()


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", xentjax.__version__)
    # A source tree that is only on the path has no metadata.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        assert importlib.metadata.version("xentjax") == xentjax.__version__


# Exporting.

Z = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
P = np.array(jax.nn.softmax(Z))
LABELS, KEEP = np.array([0, 2, 1, 2], np.int32), np.array([True, True, False, True])
SMOOTHED = xentjax.smooth_labels(LABELS, jnp.float32(0.1), background=P[0])


def mean(function, *static, **options):
    """The mean of a loss, as a function of its arrays."""
    return lambda *arrays: xentjax.weighted_mean(function(*arrays, *static, **options))


def with_stats(function):
    def loss(*args):
        losses, stats = function(*args)
        return xentjax.weighted_mean(losses + 1e-4 * stats.log_normalizer**2)

    return loss


def prepared(operation):
    """A target made on the way to the loss."""
    return lambda z, *args: mean(xentjax.softmax_cross_entropy)(z, operation(*args))


def augmented(augmentation):
    def loss(x, key, labels):
        x, targets = augmentation(key, x, labels, 0.4)
        return mean(xentjax.softmax_cross_entropy)(x.mean((1, 2)), targets)

    return loss


PAIRS = np.array([[0, 1], [2, 0], [1, 2], [0, 2]], np.int32)
X, W = Z @ Z.T, np.array(P)
IMAGES, KEY = np.broadcast_to(Z[:, None, None], (4, 5, 5, 3)), np.array([1, 2], np.uint32)
EXPORTED = {
    "softmax_cross_entropy": (mean(xentjax.softmax_cross_entropy), (Z, LABELS)),
    "softmax_cross_entropy of dense": (mean(xentjax.softmax_cross_entropy), (Z, P)),
    "softmax_cross_entropy of sparse": (mean(xentjax.softmax_cross_entropy), (Z, SMOOTHED)),
    "softmax_cross_entropy_with_stats": (
        with_stats(xentjax.softmax_cross_entropy_with_stats),
        (Z, LABELS),
    ),
    "linear_softmax_cross_entropy": (xentjax.linear_softmax_cross_entropy, (X, W, LABELS)),
    "linear_softmax_cross_entropy_with_stats": (
        with_stats(xentjax.linear_softmax_cross_entropy_with_stats),
        (X, W, LABELS),
    ),
    "sigmoid_binary_cross_entropy": (mean(xentjax.sigmoid_binary_cross_entropy), (Z, P)),
    "multilabel_cross_entropy": (mean(xentjax.multilabel_cross_entropy), (Z, P)),
    "binary_cross_entropy": (mean(xentjax.binary_cross_entropy), (P, P[::-1])),
    "weighted_mean": (lambda x, m: xentjax.weighted_mean(x, where=m), (Z[:, 0], KEEP)),
    "weighted_sum": (lambda x, m: xentjax.weighted_sum(x, where=m).mean(), (Z[:, 0], KEEP)),
    "per_example": (
        lambda z, t: xentjax.per_example(lambda _, x: xentjax.softmax_cross_entropy(*x))(
            None, (z, t)
        ).mean(),
        (Z, LABELS),
    ),
    "accumulate_gradients": (
        lambda z, t: xentjax.accumulate_gradients(
            lambda z, t: xentjax.weighted_sum(xentjax.softmax_cross_entropy(z[None], t)),
            microbatches=4,
        )(z[0], t)[0],
        (Z, LABELS),
    ),
    "surprisal": (mean(xentjax.surprisal), (P,)),
    "entropy": (mean(xentjax.entropy), (P,)),
    "cross_entropy": (mean(xentjax.cross_entropy), (P, P[::-1])),
    "kl_divergence": (mean(xentjax.kl_divergence), (P, P[::-1])),
    "js_divergence": (mean(xentjax.js_divergence), (P, P[::-1])),
    "perplexity": (mean(xentjax.perplexity), (Z,)),
    "softmax_surprisal": (mean(xentjax.softmax_surprisal), (Z,)),
    "softmax_entropy": (mean(xentjax.softmax_entropy), (Z,)),
    "softmax_kl_divergence": (mean(xentjax.softmax_kl_divergence), (Z, Z[::-1])),
    "softmax_js_divergence": (mean(xentjax.softmax_js_divergence), (Z, Z[::-1])),
    "target_entropy": (mean(xentjax.target_entropy, 3), (P,)),
    "target_kl_divergence": (mean(xentjax.target_kl_divergence), (Z, P)),
    "asymmetric_cross_entropy": (mean(xentjax.asymmetric_cross_entropy, 1, 4, 0.05), (Z, P)),
    "smooth_binary_labels": (mean(xentjax.smooth_binary_labels, 0.1), (P,)),
    "class_balanced_weights": (mean(xentjax.class_balanced_weights, 0.9), (P[0],)),
    "focal": (mean(xentjax.focal, 2.0), (P,)),
    "poly1": (mean(xentjax.poly1, 2.0), (P,)),
    "generalized": (mean(xentjax.generalized, 0.7), (P,)),
    "fit_temperature": (xentjax.fit_temperature, (Z, LABELS)),
    "expected_calibration_error": (xentjax.expected_calibration_error, (Z, LABELS)),
    "reliability_bins": (
        lambda z, t: xentjax.reliability_bins(z, t).confidence.sum(),
        (Z, LABELS),
    ),
    "brier_score": (mean(xentjax.brier_score), (Z, LABELS)),
    "softmax_hessian_product": (
        lambda z, t: xentjax.softmax_hessian_product(z, t, z[::-1])[0, 0],
        (Z, LABELS),
    ),
    "smooth_labels": (prepared(xentjax.smooth_labels), (Z, LABELS, np.float32(0.1))),
    "mix_targets": (prepared(xentjax.mix_targets), (Z, LABELS, P, np.float32(0.1))),
    "reweight_targets": (prepared(xentjax.reweight_targets), (Z, LABELS, P[0])),
    "dense_targets": (prepared(lambda t: xentjax.dense_targets(t, 3)), (Z, LABELS)),
    "mixup": (augmented(xentjax.mixup), (IMAGES, KEY, LABELS)),
    "cutmix": (augmented(xentjax.cutmix), (IMAGES, KEY, LABELS)),
    "top_k_targets": (prepared(lambda t: xentjax.top_k_targets(t, 2)), (Z, Z[::-1])),
    "teacher_targets": (prepared(xentjax.teacher_targets), (Z, PAIRS, Z[:, :2])),
    "bucket_logits": (lambda z: xentjax.bucket_logits(z, PAIRS).sum(), (Z,)),
    "linear_bucket_logits": (
        lambda x, w: xentjax.linear_bucket_logits(x, w, PAIRS).sum(),
        (X, W),
    ),
    "info_nce": (mean(functools.partial(xentjax.info_nce, temperature=0.5)), (Z, P)),
    "nt_xent": (mean(functools.partial(xentjax.nt_xent, temperature=0.5)), (Z, LABELS)),
    "supervised_contrastive": (
        mean(functools.partial(xentjax.supervised_contrastive, temperature=0.5)),
        (Z, LABELS),
    ),
    "additive_margin": (mean(xentjax.additive_margin, 0.5), (P[:, 0],)),
    "angular_margin": (mean(xentjax.angular_margin, 0.5), (P[:, 0],)),
    "soft_cap": (lambda z: xentjax.soft_cap(2.0)(z).sum(), (Z,)),
    "temperature": (lambda z: xentjax.temperature(2.0)(z).sum(), (Z,)),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_export(name):
    """One artefact for four platforms; here it is run on the first."""
    function, args = EXPORTED[name]
    function = jax.jit(jax.value_and_grad(function))
    exported = export.export(function, platforms=("cpu", "cuda", "tpu", "rocm"))(*args)
    assert exported.platforms == ("cpu", "cuda", "tpu", "rocm")
    got, want = exported.call(*args), function(*args)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), got, want)


def test_every_public_function_is_exported():
    on_meshes = {name for name in FUNCTIONS if "_parallel" in name}  # Their own tests do.
    assert {name.split(" ")[0] for name in EXPORTED} == set(FUNCTIONS) - on_meshes - {
        "value_checks",
        "explain",  # It reads values.
    }
