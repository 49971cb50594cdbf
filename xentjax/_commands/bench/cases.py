"""The cases of `python -m xentjax bench`, with their inputs and their limits."""

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
EAGER = ("eager", "eager-smoothing")
IN_PICTURE = ("xentjax", "optax")
MASKED = {"head-10": 0.1, "head-50": 0.5, "head-90": 0.9}
"""Heads of which a share of the tokens is masked."""


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
      dtype: The dtype of the logits, or of the inputs and the kernel.
      output: "value", or "gradient": the value and the gradient.
      logits: A key of LOGITS.
    """

    loss: str
    size: str
    shape: Size
    dtype: str
    output: str
    logits: str = "ordinary"

    @property
    def is_eager(self) -> bool:
        """Whether the call is made without compiling it as a whole."""
        return self.loss in EAGER

    @property
    def is_head(self) -> bool:
        """Whether the primals are inputs and a kernel, and not logits."""
        return self.loss == "head" or self.loss in MASKED

    @property
    def is_unusual(self) -> bool:
        """Whether the logits are such as few models make, and many do at times."""
        return self.logits != "ordinary" or self.loss == "excluded"

    @property
    def logits_bytes(self) -> int:
        """Bytes of all logits, whether or not the case has them in memory."""
        return self.shape.examples * self.shape.classes * jnp.dtype(self.dtype).itemsize

    @property
    def words(self) -> frozenset[str]:
        """The words that choose the case."""
        return frozenset((self.loss, self.size, self.dtype, self.output, self.logits))


@dataclasses.dataclass(frozen=True)
class Row:
    """Cases of one size, one dtype and one kind of logits."""

    name: str
    size: Size
    dtype: str
    losses: tuple[str, ...]
    outputs: tuple[str, ...] = ("value", "gradient")
    logits: str = "ordinary"


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
      rows: The cases.
      large: Cases that only accelerators run.
      at: Where the lines of the picture meet.
      examples: Sizes of the picture's batches, at at.classes classes.
      classes: Numbers of classes in the picture, at at.examples examples.
      absent: Contenders and limits that are not measured.
      rounds: How many samples everyone has.
      sample: Seconds that a sample takes at least: short calls are repeated within it.
      patience: Seconds after which a case has samples enough.
      compilations: How often everything is compiled.
      imports: How often the imports are measured.
    """

    rows: tuple[Row, ...]
    large: tuple[Row, ...]
    at: Size
    examples: tuple[int, ...]
    classes: tuple[int, ...]
    absent: tuple[str, ...]
    rounds: int
    sample: float
    patience: float
    compilations: int
    imports: int


def all_cases(plan: Plan, platform: str) -> list[Case]:
    """Returns the cases of a plan; those of the same logits follow each other."""
    found = []
    for row in plan.rows + (() if platform == "cpu" else plan.large):
        for loss in row.losses:
            for output in ("value",) if loss in EAGER else row.outputs:
                found.append(Case(loss, row.name, row.size, row.dtype, output, row.logits))
    cross = {Size(n, plan.at.classes) for n in plan.examples}
    cross |= {Size(plan.at.examples, v) for v in plan.classes}
    for size in sorted(cross):
        for loss in ("labels", "smoothing"):
            found.append(Case(loss, "scaling", size, "float32", "gradient"))
    return found


def words(plan: Plan) -> list[list[str]]:
    """Returns the words that choose cases: losses, sizes, dtypes, outputs, kinds of logits."""
    rows = plan.rows + plan.large
    losses = [loss for loss in CONTENDERS if any(loss in row.losses for row in rows)]
    sizes = list(dict.fromkeys(row.name for row in rows))
    logits = [kind for kind in LOGITS if any(kind == row.logits for row in rows)]
    return [
        losses + ["import"] * (plan.imports > 0),
        sizes + ["scaling"] * bool(plan.examples or plan.classes),
        ["float32", "bfloat16"],
        ["value", "gradient"],
        logits,
    ]


def chosen(found: list[Case], plan: Plan, given: Collection[str]) -> list[Case]:
    """Returns the cases that have, of each kind of word that is given, one of those given."""
    kinds = [set(given) & set(kind) for kind in words(plan)]
    return [case for case in found if all(case.words & kind for kind in kinds if kind)]


def contenders(case: Case, plan: Plan) -> dict[str, Callable[..., Any] | Foreign]:
    """Returns the contenders of a case, by name."""
    everyone = CONTENDERS[case.loss]
    names = IN_PICTURE if case.size == "scaling" else everyone
    return {name: everyone[name] for name in names if name not in plan.absent}


def _matmuls(inputs, kernel):
    """The three of a head with its gradient."""
    logits = inputs @ kernel
    return logits @ kernel.T, inputs.T @ logits


def limits(case: Case, plan: Plan) -> dict[str, Callable[..., Any]]:
    """Returns functions of the primals that no loss of that size can much outrun.

    A read of the logits is the least that a value takes, a read and a write of them (a copy) the
    least that their gradient takes; a head has one matmul, and two more for its gradients.
    """
    if case.is_head:
        found = {"matmuls": jnp.matmul if case.output == "value" else _matmuls}
    else:
        found = {"copy": jnp.copy, "read": lambda z: z.max(-1)}
    return {name: limit for name, limit in found.items() if name not in plan.absent}


def inputs(case: Case) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Returns (the primals, which are differentiated; the targets)."""
    n, v, features = case.shape
    rng = np.random.default_rng(1)
    labels = jnp.asarray(rng.integers(v, size=n), jnp.int32)
    if case.is_head:
        kernel = _normal((features, v), case.dtype, 2 / math.sqrt(features))
        kept = (jnp.asarray(rng.random(n) >= MASKED[case.loss]),) if case.loss in MASKED else ()
        return (_normal((n, features), case.dtype), kernel), (labels, *kept)
    z = LOGITS[case.logits](_normal((n, v), case.dtype, 2))
    if case.loss == "mixup":
        return (z,), (labels, jnp.flip(labels), jnp.float32(0.7))
    if case.loss == "masked":
        return (z,), (labels, jnp.arange(n) % 4 > 0)
    if case.loss in ("dense", "excluded"):
        masses = _distributions(n, v)
        z, masses = _without_a_tenth(z, masses) if case.loss == "excluded" else (z, masses)
        return (z,), (masses,)
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


LOGITS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "ordinary": lambda z: z,
    "x50": lambda z: 50 * z,
    "low16": lambda z: z.at[:, :16].set(-200),
}
"""Changes to logits from a normal distribution with the standard deviation 2."""


def _without_a_tenth(z, targets):
    """Rules out a tenth of the classes of each example, never the first one."""
    allowed = jnp.asarray(np.random.default_rng(3).random(z.shape, np.float32) < 0.9)
    allowed = allowed.at[:, 0].set(True)
    targets = jnp.where(allowed, targets, jnp.zeros_like(targets))
    z = jnp.where(allowed, z, jnp.full_like(z, -jnp.inf))
    return z, targets / targets.sum(-1, keepdims=True)


_LOSSES = ("labels", "masked", "smoothing", "mixup", "dense")
_SMALL, _IMAGE, _LANGUAGE = Size(256, 10), Size(4096, 1000), Size(2048, 50257, 768)
_LARGE = Size(16384, 128256, 4096)

FULL = Plan(
    rows=(
        Row("small", _SMALL, "float32", (*EAGER, *_LOSSES, *SIGMOID)),
        Row("small", _SMALL, "bfloat16", (*_LOSSES, *SIGMOID)),
        Row("image", _IMAGE, "float32", (*_LOSSES, "excluded", *SIGMOID)),
        Row("image", _IMAGE, "bfloat16", (*_LOSSES, *SIGMOID)),
        Row("language", _LANGUAGE, "float32", (*_LOSSES, "head", *MASKED)),
        Row("language", _LANGUAGE, "bfloat16", (*_LOSSES, "head")),
    ),
    large=(Row("large", _LARGE, "bfloat16", (*_LOSSES, "head")),),
    at=Size(1024, 16384),
    examples=(64, 128, 256, 512, 1024, 2048, 4096),
    classes=(1024, 2048, 4096, 8192, 16384, 32768, 65536),
    absent=(),
    rounds=10,
    sample=5e-3,
    patience=20,
    compilations=3,
    imports=3,
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
    rounds=10,
    sample=5e-3,
    patience=0.3,
    compilations=1,
    imports=1,
)


MAP_SIZES = (
    (32, 10),
    (256, 10),
    (256, 1000),
    (1024, 1000),
    (4096, 1000),
    (1024, 4096),
    (128, 16384),
    (256, 21841),
    (256, 50257),
    (1024, 50257),
)


def _map_rows() -> tuple[Row, ...]:
    """Returns the cases of the speed map, with unusual logits right after their usual ones."""
    softmax = ("labels", "smoothing", "dense")
    rows = []
    for n, v in MAP_SIZES:
        name, size = f"{n}x{v}", Size(n, v)
        has_binary = (n, v) in {(32, 10), (256, 1000), (1024, 4096), (256, 50257)}
        has_bfloat16 = (n, v) not in {(32, 10), (128, 16384), (256, 21841)}
        for dtype in ("float32", "bfloat16") if has_bfloat16 else ("float32",):
            rows.append(Row(name, size, dtype, softmax + ("binary",) * has_binary))
            if dtype == "float32" and (n, v) in {(4096, 1000), (256, 50257)}:
                rows.append(Row(name, size, dtype, softmax, logits="x50"))
                rows.append(Row(name, size, dtype, softmax, logits="low16"))
                rows.append(Row(name, size, dtype, ("excluded",)))
        if size == _SMALL:
            rows.append(Row(name, size, "float32", EAGER))
    return tuple(rows)


MAP = Plan(
    rows=_map_rows(),
    large=(),
    at=_SMALL,
    examples=(),
    classes=(),
    absent=("jax.nn", "torch", "copy", "read"),
    rounds=51,  # Many short samples in turn: other work on the machine hits everyone alike.
    sample=1e-3,
    patience=1,
    compilations=1,
    imports=0,
)

PLANS = {"full": FULL, "quick": QUICK, "map": MAP}
