"""Trees with leaves that are no arrays, such as the functions and switches of a model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xentjax._jax import checks


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Constant:
    """A leaf that is no array, made a part of the structure of its tree.

    1, 1.0 and True are equal and have one hash; `kind` tells them apart.
    """

    kind: type
    value: Any


def hide_constants(name: str, tree: Any) -> Any:
    """Returns `tree` with a Constant for each leaf that is no array, for JAX to map over."""

    def hide(path, x):
        if isinstance(x, jax.Array | np.ndarray | np.generic):
            return x
        try:
            hash(x)
        except TypeError as error:
            where = name + jax.tree_util.keystr(path)
            wanted = "an array, or a constant that has a hash"
            raise TypeError(f"{where}: expected {wanted}, got {x!r}") from error
        return Constant(type(x), x)

    return jax.tree_util.tree_map_with_path(hide, tree)


def show_constants(tree: Any) -> Any:
    """Returns `tree` with its constants as they were before `hide_constants`."""
    return jax.tree.map(
        lambda x: x.value if isinstance(x, Constant) else x, tree, is_leaf=_is_constant
    )


def partition(name: str, tree: Any) -> tuple[Any, Any]:
    """Returns `tree` twice: its arrays of floats, and all its other leaves; None elsewhere.

    Raises:
      TypeError: No leaf is an array of floats.
    """

    def keep(differentiable):
        def keep_leaf(x):
            is_float = not _is_constant(x) and jnp.issubdtype(x.dtype, jnp.inexact)
            return x if is_float == differentiable else None

        return jax.tree.map(keep_leaf, tree, is_leaf=_is_constant)

    floats = keep(True)
    checks.check(
        bool(jax.tree.leaves(floats)),
        f"{name}: expected an array of floats to differentiate, got none",
        TypeError,
    )
    return floats, keep(False)


def combine(floats: Any, others: Any) -> Any:
    """Returns the tree that `partition` took apart."""
    return jax.tree.map(
        lambda x, other: other if x is None else x, floats, others, is_leaf=lambda x: x is None
    )


def _is_constant(x: Any) -> bool:
    return isinstance(x, Constant)
