"""PyTorch's losses, expressed by composition, against what PyTorch answered.

The answers are in `torch_answers.json`; where PyTorch is installed it is asked again.
"""

import json
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import jit
from record_torch_answers import ANSWERS, answered, cases

import xentjax
from xentjax import WeightedSum

CASES = json.loads(ANSWERS.read_text())


def cross_entropy(logits, target, *, weight=None, reduction="mean", **options):
    """torch.nn.functional.cross_entropy: classes on axis 1, or on axis 0 without a batch."""
    axis = min(1, logits.ndim - 1)
    soft = jnp.issubdtype(target.dtype, jnp.floating)
    if soft:  # Operations on dense targets want the classes last.
        logits, target, axis = jnp.moveaxis(logits, axis, -1), jnp.moveaxis(target, axis, -1), -1
    alpha = jnp.asarray(options.get("label_smoothing", 0.0), logits.dtype)  # As exact as they are.
    targets = xentjax.smooth_labels(target, alpha)
    if weight is not None:
        targets = xentjax.reweight_targets(targets, weight)
    keep = None if soft else target != options.get("ignore_index", -100)
    losses = xentjax.softmax_cross_entropy(logits, targets, axis=axis, where=keep)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if soft or weight is None:
        return xentjax.weighted_mean(losses, where=keep)
    weights = xentjax.weighted_sum(weight[target], where=keep)
    return WeightedSum(losses.sum(), weights.total).mean()


def binary_cross_entropy_with_logits(
    logits, target, *, weight=None, pos_weight=None, reduction="mean"
):
    """torch.nn.functional.binary_cross_entropy_with_logits; both weights broadcast."""
    if pos_weight is not None:
        pos_weight = jnp.broadcast_to(pos_weight, logits.shape)
    losses = xentjax.sigmoid_binary_cross_entropy(logits, target, pos_weight=pos_weight)
    if weight is not None:
        losses = losses * weight
    return {"none": losses, "sum": losses.sum(), "mean": losses.mean()}[reduction]


OURS: dict[str, Callable[..., jax.Array]] = {
    "cross_entropy": cross_entropy,
    "binary_cross_entropy_with_logits": binary_cross_entropy_with_logits,
}


def ours(case, dtype):
    """Returns our loss, and the gradient to the input of the sum of the losses."""

    def array(x):
        x = np.asarray(x)
        return jnp.asarray(x, jnp.int32 if x.dtype.kind == "i" else dtype)

    options = {k: array(v) if k.endswith("weight") else v for k, v in case["options"].items()}
    function, target = OURS[case["function"]], array(case["target"])

    def summed(logits):
        loss = function(logits, target, **options)
        return loss.sum(), loss

    gradient, loss = jit(jax.grad(summed, has_aux=True))(array(np.asarray(case["input"], float)))
    return loss, gradient


def assert_same(got, want, dtype):
    """PyTorch subtracts numbers of the logits' size, up to 25, so a small loss is no more exact."""
    eps = float(np.finfo(dtype).eps)
    (loss, gradient), (their_loss, their_gradient) = got, want
    assert loss.dtype == gradient.dtype == dtype
    np.testing.assert_allclose(loss, their_loss, rtol=16 * eps, atol=64 * eps)
    np.testing.assert_allclose(gradient, their_gradient, rtol=0, atol=16 * eps)


def identity(case):
    options = ",".join(
        f"{k}={v if isinstance(v, int | str | float) else 'x'.join(map(str, np.shape(v)))}"
        for k, v in case["options"].items()
    )
    kind = "-soft" if np.asarray(case["target"]).dtype.kind == "f" else ""
    return f"{case['function'][:6]}{kind}-{np.shape(case['input'])}-{options}"


@pytest.mark.parametrize("case", CASES, ids=identity)
def test_agrees_with_recorded_answers(case):
    with jax.enable_x64(True):
        assert_same(ours(case, np.float64), (case["loss"], case["gradient"]), np.float64)


@pytest.mark.parametrize("case", CASES[::7], ids=identity)
def test_agrees_in_float32(case):
    want = tuple(np.asarray(x) for x in (case["loss"], case["gradient"]))
    assert_same(ours(case, np.float32), want, np.float32)


def test_records_are_of_the_cases():
    """Whoever changes the cases records their answers again."""
    assert [
        {k: case[k] for k in expected} for case, expected in zip(CASES, cases(), strict=True)
    ] == list(cases())
    assert ANSWERS.stat().st_size < 200_000


def test_records_are_what_torch_answers():
    pytest.importorskip("torch")
    for case in CASES:
        again = answered(case)
        for part in ("loss", "gradient"):
            np.testing.assert_allclose(again[part], case[part], rtol=1e-12, atol=1e-14)


SAMPLES = """
import json, torch
from torch.testing._internal.common_methods_invocations import op_db
for name in ("cross_entropy", "binary_cross_entropy_with_logits"):
    (op,) = [op for op in op_db if op.name == "nn.functional." + name]
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True):
        values = {k: v.tolist() if torch.is_tensor(v) else v for k, v in sample.kwargs.items()}
        print(json.dumps({
            "function": name,
            "input": sample.input.tolist(),
            "target": sample.args[0].tolist(),
            "options": values,
        }))
"""


def test_agrees_on_torchs_own_samples():
    """PyTorch's test suite has samples of both functions; they need `expecttest` as well."""
    pytest.importorskip("torch")
    pytest.importorskip("expecttest")
    run = subprocess.run(
        [sys.executable, "-c", SAMPLES], capture_output=True, text=True, check=True
    )
    samples = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(samples) > 40
    with jax.enable_x64(True):
        for sample in samples:
            case = answered(sample)
            assert_same(ours(case, np.float64), (case["loss"], case["gradient"]), np.float64)
