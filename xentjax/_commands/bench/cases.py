"""What `python -m xentjax bench` measures: the cases, what goes into them, and their limits."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from xentjax._commands.bench.contenders import CONTENDERS, Foreign

SIGMOID = ("binary", "multilabel")
IN_PICTURE = ("xentjax", "optax")


class Size(NamedTuple):
    """How many of each; a size that has features has a head too."""

    examples: int
    classes: int
    features: int = 0


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
      loss: A key of CONTENDERS.
      size: The name of its size; "scaling" in the picture.
      shape: That size.
      dtype: Of the logits, or of the inputs and the kernel.
      output: "value", or "gradient": the value and the gradient.
    """

    loss: str
    size: str
    shape: Size
    dtype: str
    output: str

    @property
    def logits_bytes(self) -> int:
        """Bytes of all logits, whether or not the case has them in memory."""
        return self.shape.examples * self.shape.classes * jnp.dtype(self.dtype).itemsize

    @property
    def words(self) -> frozenset[str]:
        """Returns what the case can be chosen by."""
        return frozenset((self.loss, self.size, self.dtype, self.output))


@dataclasses.dataclass(frozen=True)
class Row:
    """Cases of one size and dtype."""

    name: str
    size: Size
    dtype: str
    losses: tuple[str, ...]
    outputs: tuple[str, ...] = ("value", "gradient")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
      rows: The cases.
      large: Those for accelerators alone.
      at: Where the lines of the picture meet.
      examples: Sizes of its batches, at at.classes classes.
      classes: Numbers of classes, at at.examples examples.
      absent: Contenders that would take most of the time.
      patience: Seconds after which a case has samples enough.
      repeats: How often everything is compiled, and imported.
    """

    rows: tuple[Row, ...]
    large: tuple[Row, ...]
    at: Size
    examples: tuple[int, ...]
    classes: tuple[int, ...]
    absent: tuple[str, ...]
    patience: float
    repeats: int


def cases(plan: Plan, platform: str) -> list[Case]:
    """Returns the cases of a plan; those of the same logits follow each other."""
    found = []
    for row in plan.rows + (() if platform == "cpu" else plan.large):
        for loss in row.losses:
            outputs = ("value",) if loss == "eager" else row.outputs
            found += [Case(loss, row.name, row.size, row.dtype, output) for output in outputs]
    cross = {Size(n, plan.at.classes) for n in plan.examples}
    cross |= {Size(plan.at.examples, v) for v in plan.classes}
    for size in sorted(cross):
        for loss in ("labels", "smoothing"):
            found.append(Case(loss, "scaling", size, "float32", "gradient"))
    return found


def words(plan: Plan) -> list[list[str]]:
    """Returns what cases can be chosen by: losses, sizes, dtypes and outputs."""
    rows = plan.rows + plan.large
    sizes = [*dict.fromkeys(row.name for row in rows), "scaling"]
    return [[*CONTENDERS, "import"], sizes, ["float32", "bfloat16"], ["value", "gradient"]]


def chosen(found: list[Case], plan: Plan, given: Collection[str]) -> list[Case]:
    """Returns the cases that have, of each kind of word that is given, one of those given."""
    kinds = [set(given) & set(kind) for kind in words(plan)]
    return [case for case in found if all(case.words & kind for kind in kinds if kind)]


def contenders(case: Case, plan: Plan) -> dict[str, Callable[..., Any] | Foreign]:
    """Returns who contends in a case."""
    everyone = CONTENDERS[case.loss]
    names = IN_PICTURE if case.size == "scaling" else everyone
    return {name: everyone[name] for name in names if name not in plan.absent}


def _matmuls(inputs, kernel):
    """The three of a head with its gradient."""
    logits = inputs @ kernel
    return logits @ kernel.T, inputs.T @ logits


def limits(case: Case) -> dict[str, Callable[..., Any]]:
    """Returns functions of what is differentiated that no loss of that size can much outrun.

    A read of the logits is the least that a value takes, a read and a write of them (a copy) the
    least that their gradient takes; a head has one matmul, and two more for its gradients.
    """
    if case.loss == "head":
        return {"matmuls": jnp.matmul if case.output == "value" else _matmuls}
    return {"copy": jnp.copy, "read": lambda z: z.max(-1)}


def inputs(case: Case) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Returns (what is differentiated, the targets)."""
    n, v, features = case.shape
    rng = np.random.default_rng(1)
    labels = jnp.asarray(rng.integers(v, size=n), jnp.int32)
    if case.loss == "head":
        kernel = _normal((features, v), case.dtype, 2 / math.sqrt(features))
        return (_normal((n, features), case.dtype), kernel), (labels,)
    z = _normal((n, v), case.dtype, 2)
    if case.loss == "mixup":
        return (z,), (labels, jnp.flip(labels), jnp.float32(0.7))
    if case.loss == "masked":
        return (z,), (labels, jnp.arange(n) % 4 > 0)
    if case.loss == "dense":
        return (z,), (_distributions(n, v),)
    if case.loss in SIGMOID:
        yes = jnp.asarray(rng.random((n, v), np.float32) < 0.1, jnp.float32)
        if case.loss == "binary":
            z, yes = z.reshape(-1), yes.reshape(-1)
        return (z,), (yes,)
    return (z,), (labels,)


@functools.lru_cache(maxsize=2)
def _normal(shape: tuple[int, int], dtype: str, scale: float = 1.0) -> Float[Array, "n m"]:
    """Returns numbers from a normal distribution; those of the last shapes are kept."""
    numbers = np.random.default_rng(0).standard_normal(shape, np.float32)
    return jnp.asarray(scale * numbers).astype(dtype)


@functools.lru_cache(maxsize=1)
def _distributions(n: int, v: int) -> Float[Array, "n v"]:
    """Returns a distribution for each example, as of a teacher that is not sure."""
    masses = np.random.default_rng(2).standard_exponential((n, v), np.float32)
    return jnp.asarray(masses / masses.sum(-1, keepdims=True))


_LOSSES = ("labels", "masked", "smoothing", "mixup", "dense")
_SMALL, _IMAGE, _LANGUAGE = Size(256, 10), Size(4096, 1000), Size(2048, 50257, 768)
_LARGE = Size(16384, 128256, 4096)

FULL = Plan(
    rows=(
        Row("small", _SMALL, "float32", ("eager", *_LOSSES, *SIGMOID)),
        Row("small", _SMALL, "bfloat16", (*_LOSSES, *SIGMOID)),
        Row("image", _IMAGE, "float32", (*_LOSSES, *SIGMOID)),
        Row("image", _IMAGE, "bfloat16", (*_LOSSES, *SIGMOID)),
        Row("language", _LANGUAGE, "float32", (*_LOSSES, "head")),
        Row("language", _LANGUAGE, "bfloat16", (*_LOSSES, "head")),
    ),
    large=(Row("large", _LARGE, "bfloat16", (*_LOSSES, "head")),),
    at=Size(1024, 16384),
    examples=(64, 128, 256, 512, 1024, 2048, 4096),
    classes=(1024, 2048, 4096, 8192, 16384, 32768, 65536),
    absent=(),
    patience=20,
    repeats=3,
)
_FEW_IMAGES, _FEW_TOKENS = Size(512, 1000), Size(128, 50257, 128)

QUICK = Plan(
    rows=(
        Row("small", _SMALL, "float32", ("eager", "labels", "smoothing")),
        Row(
            "image",
            _FEW_IMAGES,
            "float32",
            ("labels", "smoothing", "mixup", "dense", "multilabel"),
            ("gradient",),
        ),
        Row("language", _FEW_TOKENS, "float32", ("labels", "smoothing", "head")),
        Row("language", _FEW_TOKENS, "bfloat16", ("labels", "smoothing"), ("gradient",)),
    ),
    large=(),
    at=Size(256, 4096),
    examples=(32, 256, 2048),
    classes=(512, 4096, 32768),
    absent=("torch fused",),
    patience=0.3,
    repeats=1,
)
