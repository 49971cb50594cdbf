"""Losses of other libraries, written out as their sources have them, for float64.

An argument that the README's table does not use is left out.
"""

import jax
import jax.numpy as jnp
from jax import Array


def _one_hot(labels: Array, logits: Array) -> Array:
    return jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)


# torch.nn.functional


def kl_div(log_q, target, reduction, log_target=False):
    assert reduction == "batchmean"
    if log_target:
        terms = jnp.exp(target) * (target - log_q)
    else:
        terms = jnp.where(target > 0, target * jnp.log(target), 0) - target * log_q
    return terms.sum() / log_q.shape[0]


def nll_loss(log_p, labels):
    return -jnp.take_along_axis(log_p, labels[:, None], -1).mean()


def binary_cross_entropy(p, target):
    return -(target * jnp.log(p) + (1 - target) * jnp.log1p(-p)).mean()


def multilabel_soft_margin_loss(z, target):
    terms = target * jax.nn.log_sigmoid(z) + (1 - target) * jax.nn.log_sigmoid(-z)
    return -(terms.sum(-1) / z.shape[-1]).mean()


# keras.losses: classes that are made with options and called with (truth, prediction).


class SparseCategoricalCrossentropy:
    def __init__(self, from_logits):
        assert from_logits

    def __call__(self, labels, z):
        return -(_one_hot(labels, z) * jax.nn.log_softmax(z)).sum(-1).mean()


class CategoricalCrossentropy:
    def __init__(self, from_logits, label_smoothing):
        assert from_logits
        self.label_smoothing = label_smoothing

    def __call__(self, target, z):
        num_classes = target.shape[-1]
        target = target * (1 - self.label_smoothing) + self.label_smoothing / num_classes
        return -(target * jax.nn.log_softmax(z)).sum(-1).mean()


class CategoricalFocalCrossentropy:
    def __init__(self, from_logits, alpha, gamma):
        assert from_logits
        self.alpha, self.gamma = alpha, gamma

    def __call__(self, target, z):
        p = jax.nn.softmax(z)
        weights = self.alpha * (1 - p) ** self.gamma
        return (weights * -target * jnp.log(p)).sum(-1).mean()


class BinaryCrossentropy:
    def __init__(self, from_logits, label_smoothing):
        assert from_logits
        self.label_smoothing = label_smoothing

    def __call__(self, target, z):
        target = target * (1 - self.label_smoothing) + 0.5 * self.label_smoothing
        return (jnp.maximum(z, 0) - z * target + jnp.log1p(jnp.exp(-jnp.abs(z)))).mean()


class BinaryFocalCrossentropy:
    def __init__(self, from_logits, gamma):
        assert from_logits
        self.gamma = gamma

    def __call__(self, target, z):
        p = jax.nn.sigmoid(z)
        p_t = target * p + (1 - target) * (1 - p)
        terms = target * jnp.log(p) + (1 - target) * jnp.log(1 - p)
        return -((1 - p_t) ** self.gamma * terms).mean()


class KLDivergence:
    def __call__(self, target, q):
        return (target * jnp.log(target / q)).sum(-1).mean()


# timm.loss


class LabelSmoothingCrossEntropy:
    def __init__(self, smoothing):
        self.smoothing = smoothing

    def __call__(self, z, labels):
        log_p = jax.nn.log_softmax(z)
        nll = -jnp.take_along_axis(log_p, labels[:, None], -1)[:, 0]
        return ((1 - self.smoothing) * nll + self.smoothing * -log_p.mean(-1)).mean()


class SoftTargetCrossEntropy:
    def __call__(self, z, target):
        return (-target * jax.nn.log_softmax(z)).sum(-1).mean()


class TimmBinaryCrossEntropy:
    def __init__(self, smoothing):
        self.smoothing = smoothing

    def __call__(self, z, labels):
        off = self.smoothing / z.shape[-1]
        target = jnp.where(_one_hot(labels, z) == 1, 1 - self.smoothing + off, off)
        return (jnp.maximum(z, 0) - z * target + jnp.log1p(jnp.exp(-jnp.abs(z)))).mean()


class AsymmetricLossMultiLabel:
    def __init__(self, gamma_neg, gamma_pos, clip):
        self.gamma_neg, self.gamma_pos, self.clip = gamma_neg, gamma_pos, clip

    def __call__(self, z, target):
        yes = jax.nn.sigmoid(z)
        no = jnp.minimum(1 - yes + self.clip, 1)
        terms = target * jnp.log(yes) + (1 - target) * jnp.log(no)
        p_t = yes * target + no * (1 - target)
        gamma = self.gamma_pos * target + self.gamma_neg * (1 - target)
        return -(terms * (1 - p_t) ** gamma).sum()


class JsdCrossEntropy:
    def __init__(self, num_splits, alpha, smoothing):
        self.num_splits, self.alpha, self.smoothing = num_splits, alpha, smoothing

    def __call__(self, splits, labels):
        assert splits.shape[0] == self.num_splits
        loss = LabelSmoothingCrossEntropy(self.smoothing)(splits[0], labels)
        probabilities = jax.nn.softmax(splits)
        mixture = jnp.log(probabilities.mean(0))
        divergences = [kl_div(mixture, p, "batchmean") for p in probabilities]
        return loss + self.alpha * sum(divergences) / len(divergences)


# flax/examples/lm1b/train.py


def compute_weighted_cross_entropy(z, labels, weights, label_smoothing):
    num_classes, confidence = z.shape[-1], 1 - label_smoothing
    low = (1 - confidence) / (num_classes - 1)
    constant = -(confidence * jnp.log(confidence) + (num_classes - 1) * low * jnp.log(low))
    target = jnp.where(_one_hot(labels, z) == 1, confidence, low)
    losses = -(target * jax.nn.log_softmax(z)).sum(-1) - constant
    return (losses * weights).sum(), weights.sum()


# torchvision.ops


def sigmoid_focal_loss(z, target, alpha, gamma, reduction):
    assert reduction == "mean"
    p = jax.nn.sigmoid(z)
    cross_entropy = jnp.maximum(z, 0) - z * target + jnp.log1p(jnp.exp(-jnp.abs(z)))
    p_t = p * target + (1 - p) * (1 - target)
    alpha_t = alpha * target + (1 - alpha) * (1 - target)
    return (alpha_t * cross_entropy * (1 - p_t) ** gamma).mean()


_HERE = dict(globals())
FORMULAS = {
    "torch": _HERE,
    "Keras": _HERE,
    "timm": _HERE | {"BinaryCrossEntropy": TimmBinaryCrossEntropy},
    "Flax's lm1b": _HERE,
    "torchvision": _HERE,
}
