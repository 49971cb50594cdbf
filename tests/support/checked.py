"""A loss under `value_checks`, by itself and in a loop."""

import jax
import jax.numpy as jnp

import xentjax


def checked_loss(logits, targets):
    """Returns the total loss, its values checked."""
    with xentjax.value_checks():
        return xentjax.softmax_cross_entropy(logits, targets).sum()


def checked_in_scan(logits, targets):
    """Returns the same, one example after another."""

    def step(total, example):
        return total + checked_loss(*example), None

    return jax.lax.scan(step, jnp.zeros(()), (logits, targets))[0]
