# pyright: strict, reportUnknownMemberType=false
# Some parameters of jax's own functions have no known type (jax 0.10.2).
"""A script as a user writes it: pyright checks its types, and a test runs it."""

from typing import assert_type

import jax
import jax.numpy as jnp

import xentjax

Params = dict[str, jax.Array]
Batch = tuple[jax.Array, jax.Array]

# Lists are labels and masses, and labels become SparseTargets.
labels = [0, 2, 1, 0]
targets = assert_type(xentjax.smooth_labels(labels, 0.1), xentjax.SparseTargets)
targets = assert_type(xentjax.mix_targets(targets, labels, 0.7), xentjax.SparseTargets)
targets = assert_type(xentjax.reweight_targets(targets, [1.0, 5.0, 2.0]), xentjax.SparseTargets)
masses = assert_type(xentjax.dense_targets(labels, 3), jax.Array)
form: xentjax.Targets = [[0.0, 1.0, 0.0]] * 4

logits = jnp.zeros((4, 3))
losses = assert_type(xentjax.softmax_cross_entropy(logits, labels), jax.Array)
assert_type(xentjax.softmax_cross_entropy(logits, form), jax.Array)
losses, stats = xentjax.softmax_cross_entropy_with_stats(logits, targets)
assert_type(stats, xentjax.SoftmaxStats)
assert_type(stats.entropy, jax.Array)
assert_type(xentjax.sigmoid_binary_cross_entropy(logits, masses), jax.Array)
assert_type(xentjax.multilabel_cross_entropy(logits, masses, axis=(-1,)), jax.Array)
assert_type(xentjax.binary_cross_entropy(masses, masses), jax.Array)

head = xentjax.linear_softmax_cross_entropy(
    jnp.ones((4, 2)), jnp.ones((2, 3)), labels, logit_transform=xentjax.soft_cap(30.0)
)
assert_type(head, jax.Array)
losses, head_stats = xentjax.linear_softmax_cross_entropy_with_stats(
    jnp.ones((4, 2)), jnp.ones((2, 3)), labels, logit_transform=jnp.tanh
)
assert_type(head_stats.label_log_probability, jax.Array)
of_head = xentjax.LinearTargets(jnp.ones((4, 5)), jnp.ones((5, 3)), temperature=2.0)
distilled = xentjax.linear_softmax_cross_entropy(jnp.ones((4, 2)), jnp.ones((2, 3)), of_head)
assert_type(distilled, jax.Array)

teacher = assert_type(xentjax.top_k_targets(logits, 2), xentjax.SparseTargets)
stored = xentjax.teacher_targets(teacher.indices, jnp.log(teacher.weights))
assert_type(stored, xentjax.SparseTargets)
assert_type(xentjax.bucket_logits(logits, teacher.indices), jax.Array)
buckets = xentjax.linear_bucket_logits(jnp.ones((4, 2)), jnp.ones((2, 3)), teacher.indices)
assert_type(buckets, jax.Array)
pairs = jnp.eye(4)
assert_type(xentjax.info_nce(pairs, pairs, temperature=0.1), jax.Array)
assert_type(xentjax.nt_xent(pairs, labels, temperature=0.1), jax.Array)
assert_type(xentjax.supervised_contrastive(pairs, labels, temperature=0.1), jax.Array)
assert_type(xentjax.additive_margin(losses, xentjax.angular_margin(losses, 0.5)), jax.Array)

parts = assert_type(xentjax.WeightedSum.zero(), xentjax.WeightedSum)
parts = assert_type(parts + xentjax.weighted_sum(losses), xentjax.WeightedSum)
assert_type(parts.mean(), jax.Array)
assert_type(xentjax.weighted_mean(losses, where=jnp.ones(4, bool)), jax.Array)

# Augmentations and functions of a batch keep the types of their trees.
key = jax.random.key(0)
inputs = {"image": jnp.ones((4, 2))}
inputs, mixed = xentjax.mixup(key, inputs, jnp.array(labels), 0.4)
assert_type(inputs, dict[str, jax.Array])
images, pasted = xentjax.cutmix(key, jnp.ones((4, 2, 2)), labels, 0.4)
assert_type(images, jax.Array)
assert_type(pasted, xentjax.SparseTargets)


def loss_of_batch(params: Params, batch: Batch) -> xentjax.WeightedSum:
    """Returns the parts of the mean loss of a batch."""
    x, y = batch
    return xentjax.weighted_sum(xentjax.softmax_cross_entropy(x @ params["kernel"], y))


def loss_of_example(params: Params, example: Batch) -> jax.Array:
    """Returns the loss of one example."""
    x, y = example
    return xentjax.softmax_cross_entropy(x @ params["kernel"], y)


params: Params = {"kernel": jnp.zeros((2, 3))}
batch: Batch = jnp.ones((4, 2)), jnp.array(labels)
each = xentjax.per_example(loss_of_example, gradients=True)(params, batch)
assert_type(each, tuple[jax.Array, Params])
assert_type(xentjax.per_example(loss_of_example)(params, batch), jax.Array)
mean, gradient = xentjax.accumulate_gradients(loss_of_batch, microbatches=2)(params, batch)
assert_type(mean, jax.Array)
assert_type(gradient, Params)
mesh = jax.make_mesh((1,), ("data",))
assert_type(xentjax.data_parallel(loss_of_batch, mesh)(params, batch), tuple[jax.Array, Params])

chances, guess = jnp.array([0.5, 0.5]), jnp.array([0.1, 0.9])
for measure in (
    xentjax.surprisal(0.1, base=2),
    xentjax.entropy(chances),
    xentjax.cross_entropy(chances, guess),
    xentjax.kl_divergence(chances, guess),
    xentjax.js_divergence(chances, guess),
    xentjax.perplexity(1.0),
    xentjax.softmax_surprisal(logits),
    xentjax.softmax_entropy(logits),
    xentjax.softmax_kl_divergence(logits, logits),
    xentjax.softmax_js_divergence(logits, logits),
    xentjax.target_entropy(targets, 3),
    xentjax.target_kl_divergence(logits, targets),
    xentjax.focal(losses, 2.0),
    xentjax.poly1(losses, 1.0),
    xentjax.generalized(losses, 0.7),
    xentjax.asymmetric_cross_entropy(logits, masses, 1.0, 4.0, 0.05),
    xentjax.smooth_binary_labels(masses, 0.1),
    xentjax.class_balanced_weights(jnp.array([5, 1, 2]), 0.9),
    xentjax.softmax_hessian_product(logits, targets, logits),
    xentjax.fit_temperature(logits, labels),
    xentjax.expected_calibration_error(logits, labels),
    xentjax.brier_score(logits, labels),
):
    assert_type(measure, jax.Array)


def told(prediction: jax.Array) -> xentjax.Explanation:
    """Returns the links of one prediction; they are numbers, and so have no trace."""
    return xentjax.explain(prediction, [0, 1], base=2)


bins = assert_type(xentjax.reliability_bins(logits, labels), xentjax.ReliabilityBins)
assert_type(bins.expected_calibration_error(), jax.Array)

with xentjax.value_checks():
    xentjax.softmax_cross_entropy(logits, labels)
