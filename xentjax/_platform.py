"""The one place where platforms are told apart."""

from collections.abc import Callable
from typing import Any

import jax


def on_one_cpu(function: Callable[..., Any], default: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` where what runs it is a CPU, one device alone, and `default` elsewhere.

    XLA's CPU backend wants memory to be read a few rows at a time, and loops that are simple. Other
    compilers want what they can fuse, and arrays that are split over devices must not be sliced.
    """
    try:
        alone = jax.device_count("cpu") == 1
    except RuntimeError:  # The user leaves the CPU out, as in JAX_PLATFORMS=cuda.
        alone = False
    if not alone:
        return default
    return lambda *args: jax.lax.platform_dependent(*args, cpu=function, default=default)
