"""Eight devices on the host, for the tests that use meshes; the others use the first."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# No Python line beside each operation of a compiled program: a tenth of the suite's time.
jax.config.update("jax_traceback_in_locations_limit", 0)

collect_ignore = ["support"]  # Its scripts would run on import; pytest looks there for doctests.


@pytest.fixture
def float64():
    """Makes float64 what JAX computes in: `pytest.mark.usefixtures("float64")` for a module."""
    with jax.enable_x64(True):
        yield
