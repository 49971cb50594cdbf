"""Operations on labels and sparse targets never make an array of batch by classes."""

import jax
import jax.numpy as jnp
import pytest

import xentjax
from xentjax import mix_targets, reweight_targets, smooth_labels


def sizes_in(jaxpr):
    """Yields the size of every array that a jaxpr makes, those of its inner ones too."""
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars)
        for parameter in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from sizes_in(inner)


MANY, ROWS = 100_000, 64
WITHOUT_DENSE = {
    "smooth": (lambda a, b, v: smooth_labels(a, 0.1), ROWS),
    "smooth to a prior": (lambda a, b, v: smooth_labels(a, 0.1, background=v), MANY),
    "mix": (lambda a, b, v: mix_targets(a, b, 0.3), 2 * ROWS),
    "mix of different backgrounds": (
        lambda a, b, v: mix_targets(
            smooth_labels(a, 0.1), smooth_labels(b, 0.1, background=v), 0.3
        ),
        2 * MANY,
    ),
    "reweight": (lambda a, b, v: reweight_targets(a, v), ROWS),
    "reweight smoothed and mixed": (
        lambda a, b, v: reweight_targets(smooth_labels(mix_targets(a, b, 0.3), 0.1), v),
        MANY,
    ),
}


@pytest.mark.parametrize("name", WITHOUT_DENSE)
def test_no_array_of_batch_by_classes_is_made(name):
    function, largest = WITHOUT_DENSE[name]
    labels = jnp.zeros(ROWS, jnp.int32)
    traced = jax.jit(function).trace(labels, labels, jnp.ones(MANY, jnp.float32))
    assert max(sizes_in(traced.jaxpr.jaxpr)) <= largest
    memory = traced.lower().compile().memory_analysis()
    assert memory is not None
    made = memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert made <= 4 * largest + 64 * ROWS


def test_the_measure_of_memory_sees_dense_targets():
    labels = jnp.zeros(ROWS, jnp.int32)
    traced = jax.jit(lambda t: xentjax.dense_targets(t, MANY)).trace(labels)
    assert max(sizes_in(traced.jaxpr.jaxpr)) == ROWS * MANY
