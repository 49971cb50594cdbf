"""Every public function without leaks, as chex's variants, and traced once."""

import chex
import jax
import numpy as np
import pytest
from cases import jit
from test_walk import FUNCTIONS, KEEP, Z, assert_same, form, plain_result, value_and_gradient

pytestmark = [pytest.mark.prove, pytest.mark.timeout(900)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_tracer_leaks(name):
    with jax.checking_leaks():
        got = jit(value_and_gradient(name))(Z, form("labels"), KEEP)
    assert_same(got, plain_result(name, "labels"))


class Variants(chex.TestCase):
    """With and without jit, on the device and off it."""

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_variants(self):
        for name in FUNCTIONS:
            got = self.variant(value_and_gradient(name))(Z, form("labels"), KEEP)
            assert_same(got, plain_result(name, "labels"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_traced_once(name):
    chex.clear_trace_counter()  # It counts by the place in the source, which all names share.
    traced = chex.assert_max_traces(value_and_gradient(name), n=1)
    function = jax.jit(traced)
    for seed in range(2):
        z = np.random.default_rng(seed).normal(size=Z.shape).astype(np.float32)
        function(z, form("labels"), KEEP)
