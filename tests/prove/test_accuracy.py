"""The contract of accuracy, measured again, and xentjax beside optax: see docs/accuracy.md."""

import accuracy
import pytest

pytestmark = [pytest.mark.prove, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module", params=accuracy.DTYPES)
def found(request):
    return accuracy.measure(dtypes=(request.param,))


def test_losses_and_gradients_keep_the_contract(found):
    ours = [m for m in found if m.contender == "xentjax"]
    assert sum(m.bound is not None for m in ours) >= 25
    assert [text for m in ours for text in accuracy.beyond_contract(m)] == []


def test_nothing_is_worse_than_optax_and_beyond_the_contract(found):
    """The contract is 8.4 ulps and more; below that, the order of a sum decides."""
    compared = accuracy.comparisons(found)
    assert len(compared) >= 50
    assert [c for c in compared if c.ours > max(c.other, accuracy.CONTRACT_ULPS)] == []


def test_the_page_has_every_number(found):
    page = accuracy.page(found)
    assert all(f"## `{m.loss_name.split()[0]}`" in page for m in found)
    assert "nan" not in page
