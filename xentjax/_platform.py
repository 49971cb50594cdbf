"""The one place where platforms are told apart."""

from collections.abc import Callable
from typing import Any

import jax


def on_one_cpu(function: Callable[..., Any], default: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` where what runs it is a CPU, one device alone, and `default` elsewhere.

    XLA's CPU backend wants memory to be read a few rows at a time, and loops that are simple. Other
    compilers want what they can fuse, and arrays that are split over devices must not be sliced.

    Both give the same, and the derivative of either is that of `default`: JAX 0.10 forgets the
    derivative rules of what is in a loop when it differentiates it a second time.
    """
    try:
        alone = jax.device_count("cpu") == 1
    except RuntimeError:  # The user leaves the CPU out, as in JAX_PLATFORMS=cuda.
        alone = False
    if not alone:
        return default

    @jax.custom_jvp
    def either(*args):
        return jax.lax.platform_dependent(*args, cpu=function, default=default)

    @either.defjvp
    def _(primals, tangents):
        return either(*primals), jax.jvp(default, primals, tangents)[1]

    return either
