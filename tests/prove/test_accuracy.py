"""The contract of accuracy, measured again, and xentjax beside optax: see docs/accuracy.md."""

import functools

import accuracy
import pytest

pytestmark = [pytest.mark.prove, pytest.mark.timeout(3600)]


every_dtype = pytest.mark.parametrize("dtype", accuracy.DTYPES)


@functools.cache
def measured(dtype):
    return accuracy.measure(dtypes=(dtype,))


@every_dtype
def test_losses_and_gradients_keep_the_contract(dtype):
    ours = [m for m in measured(dtype) if m.contender == "xentjax"]
    assert sum(m.bound is not None for m in ours) >= 25
    assert [text for m in ours for text in accuracy.beyond_contract(m)] == []


@every_dtype
def test_where_optax_is_nearer_it_is_by_a_rounding_or_two(dtype):
    """Below the contract, the order of a sum decides; 4 ulps are what two roundings differ by."""
    compared = accuracy.comparisons(measured(dtype))
    assert len(compared) >= 50
    for c in compared:
        assert c.ours <= c.other + 4, c


def test_the_page_has_every_number():
    found = [m for dtype in accuracy.DTYPES for m in measured(dtype)]
    page = accuracy.page(found)
    assert all(f"## `{m.loss_name.split()[0]}`" in page for m in found)
    assert "nan" not in page
