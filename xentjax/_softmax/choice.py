"""The one place where platforms are told apart."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from xentjax._softmax import cpu as _one_cpu
from xentjax._softmax import partial as _blocks
from xentjax._softmax.partial import Block
from xentjax._targets.types import SparseTargets


def block_of(logits: jax.Array, targets: jax.Array | SparseTargets, shares: bool = False) -> Block:
    """Returns the Block of logits [..., V] under the target mass on those V classes.

    Args:
      logits: [..., V].
      targets: The mass on those classes, ready for arithmetic.
      shares: Whether `logits_cotangent` of the same arguments follows.
    """
    if not _one_cpu.gains(logits, targets):
        return _blocks.block_of(logits, targets)
    on_cpu = functools.partial(_one_cpu.block_of, shares=shares)

    def derived(block, logits, targets):
        return _blocks.block_at(block.shift, block.m, logits, targets)

    return on_one_cpu(on_cpu, _blocks.block_of, derived)(logits, targets)


def logits_cotangent(
    block: Block,
    logits: jax.Array,
    targets: jax.Array | SparseTargets,
    loss_cotangent: jax.Array,
    lse_cotangent: jax.Array,
    shares: bool = False,
) -> jax.Array:
    """Returns loss_cotangent · (mass · p − t) + lse_cotangent · p, [..., V].

    Args:
      block: Of all classes, each field [...].
      logits: Those of some classes, [..., V].
      targets: The mass on those classes.
      loss_cotangent: [...].
      lse_cotangent: [...].
      shares: Whether `block_of` of the same logits and targets made the block.
    """
    default = function = _blocks.logits_cotangent
    if _one_cpu.gains(logits, targets):
        on_cpu = functools.partial(_one_cpu.logits_cotangent, shares=shares)
        function = on_one_cpu(on_cpu, default, lambda _, *args: default(*args))
    return function(block, logits, targets, loss_cotangent, lse_cotangent)


def on_one_cpu(
    function: Callable[..., Any], default: Callable[..., Any], derived: Callable[..., Any]
) -> Callable[..., Any]:
    """Returns `function` where what runs it is a CPU, one device alone, and `default` elsewhere.

    XLA's CPU backend wants memory to be read a few rows at a time, and loops that are simple. Other
    compilers want what they can fuse, and arrays that are split over devices must not be sliced.

    Neither is differentiated: JAX 0.10 forgets the derivative rules of what is in a loop when it
    differentiates it a second time. `derived(out, *args)` has the derivative of out.
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
        out = either(*primals)
        return out, jax.jvp(functools.partial(derived, out), primals, tangents)[1]

    return either
