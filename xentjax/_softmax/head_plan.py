"""How much of a head is in memory at once, and what that costs: a function of sizes and machine.

The way that keeps logits adds the kernel's gradient of each chunk of n tokens to a float32
accumulator [D, V], which is read and written: 8 · D · V bytes beside the 6 · n · D · V operations
of three matmuls. On a machine with a balance of b operations for each byte, that traffic takes

    8 · b / (6 · n)

of the time of the matmuls. A GPU needs long chunks therefore. A CPU does not, and its caches like
short ones. Its plan, and that of everything else, are both made, since a program may be compiled
for either; the code takes the one of the platform that it is compiled for.
"""

import math
from typing import Any, NamedTuple


class HeadPlan(NamedTuple):
    """How much of a head is in memory at once.

    Attributes:
      tokens: Tokens in a chunk.
      classes: Classes in a block.
      keeps_logits: Whether there is memory for the way that keeps the logits of a chunk.
    """

    tokens: Any
    classes: int
    keeps_logits: bool


class Machine(NamedTuple):
    """The facts of a machine that a plan depends on.

    Attributes:
      logits_bytes: Bytes for the logits of a chunk of tokens.
      block_bytes: Bytes for the other arrays of a block of classes.
      min_tokens: So many tokens of a chunk make the traffic of the accumulator cost little.
    """

    logits_bytes: int
    block_bytes: int
    min_tokens: int


MIN_BLOCK = 128
"""So few tokens or classes make the smallest memory."""

CPU = Machine(logits_bytes=2**28, block_bytes=2**27, min_tokens=MIN_BLOCK)
"""A quarter of a GiB of logits: a larger matmul is no longer a faster one."""

BALANCE = 250
"""Operations for each byte: an H100's 750 TFLOP/s of bfloat16 and 3 TB/s."""

ACCELERATOR = Machine(
    logits_bytes=2**30,
    block_bytes=3 * 2**27,
    min_tokens=MIN_BLOCK * math.ceil(8 * BALANCE / (6 * 0.125) / MIN_BLOCK),
)
"""The traffic of the kernel's accumulator takes an eighth to a sixth of the matmuls' time.

Every block of classes adds to the inputs' gradient: blocks are so large that this takes less than a
quarter as long. Less of the one or the other is paid in memory. At 16384 tokens, 4096 features and
128256 classes of bfloat16, where the accumulator is 2 GiB, no plan has 15% of traffic in less than
3.7 GiB of temporaries, and none has less than 24% in 3 GiB.
"""

RECOMPUTED_TOKENS = 1024
"""So many tokens of a chunk make the reading of the kernel cost little."""

MIN_SKIPPED_TOKENS = 256
"""Chunks as short as this are made so that masked ones can be left out."""


class Sizes(NamedTuple):
    """The sizes of a head, on one device.

    Attributes:
      tokens: N; known by name alone under `jax.export`.
      features: D.
      classes: V.
      itemsize: Bytes of a number in the arithmetic.
      teacher_features: Those of a teacher, if it has any; its logits are kept too.
      may_skip: Whether a mask may leave tokens out.
    """

    tokens: Any
    features: int
    classes: int
    itemsize: int = 4
    teacher_features: int = 0
    may_skip: bool = False

    @property
    def kept_rows(self) -> int:
        """Rows of V numbers that are kept for each token."""
        return 2 if self.teacher_features else 1


def make_plan(
    sizes: Sizes, memory_budget: int | None = None, shards: int = 1, machine: Machine = CPU
) -> HeadPlan:
    """Returns the plan of a head.

    Args:
      sizes: On this device.
      memory_budget: Bytes for temporaries; None leaves the choice to the machine.
      shards: How many devices share the classes.
      machine: The machine that the default is for.
    """
    logits_bytes, block_bytes, min_tokens = machine
    logits_bytes, block_bytes = logits_bytes // shards, block_bytes // shards
    if memory_budget is not None:
        accumulator = sizes.itemsize * sizes.features * sizes.classes
        left = max(memory_budget - accumulator, 0)
        logits_bytes, block_bytes, min_tokens = left // 2, left // 4, MIN_BLOCK
    is_known = isinstance(sizes.tokens, int)
    tokens = logits_bytes // (sizes.itemsize * sizes.classes * sizes.kept_rows)
    keeps_logits = is_known and tokens >= min(sizes.tokens, MIN_BLOCK)
    if not keeps_logits:
        block_bytes = block_bytes if memory_budget is None else memory_budget // 4
        tokens = RECOMPUTED_TOKENS
    elif min_tokens > MIN_BLOCK:
        tokens = max(tokens, min_tokens // sizes.kept_rows)
    if is_known and sizes.may_skip:
        tokens = min(tokens, max(sizes.tokens // 16, MIN_SKIPPED_TOKENS, min_tokens))
    tokens = _even(sizes.tokens, tokens) if is_known else RECOMPUTED_TOKENS
    # A block has a few arrays of [tokens, classes], and of [features, classes].
    rows = 2 * tokens * sizes.kept_rows + sizes.features + sizes.teacher_features
    classes = block_bytes // (sizes.itemsize * rows)
    classes = _even(sizes.classes, classes)
    return HeadPlan(tokens if is_known else sizes.tokens, classes, keeps_logits)


def _even(size: int, chunk: int) -> int:
    """Returns a chunk of about `chunk`, not below 128, that cuts `size` into even pieces."""
    count = max(1, math.ceil(size / max(chunk, MIN_BLOCK)))
    return max(1, min(size, math.ceil(size / count / MIN_BLOCK) * MIN_BLOCK))


class Cost(NamedTuple):
    """The predicted cost of a value with both gradients.

    Attributes:
      matmuls: Operations of the matmuls.
      accumulator: Bytes read and written of the gradients that chunks add to.
      logits: Bytes read and written of logits and of their gradient, beside the matmuls.
      temporaries: Bytes at once, without the results.
    """

    matmuls: int
    accumulator: int
    logits: int
    temporaries: int

    def share(self, balance: float = BALANCE) -> float:
        """Returns the time of the accumulator's traffic beside that of the matmuls."""
        return self.accumulator * balance / self.matmuls


def predict(plan: HeadPlan, sizes: Sizes, operand_itemsize: int) -> Cost:
    """Returns the cost of a value with the gradients to inputs and kernel, for labels.

    `operand_itemsize` are the bytes of a number in a matmul: 2 of bfloat16.
    """
    n, d, v, itemsize, *_ = sizes
    one = 2 * n * d * v
    chunks, pieces = math.ceil(n / plan.tokens), math.ceil(v / plan.classes)
    of_kernel, of_inputs = itemsize * d * v, itemsize * n * d
    is_narrow = operand_itemsize < itemsize  # Wide sums are the results themselves.
    # A chunk's inputs and their gradient. In a block: the gradient of its logits in the arithmetic
    # and as an operand, and of its kernel.
    chunk = plan.tokens * d * (itemsize + operand_itemsize)
    block = plan.classes * (plan.tokens * (itemsize + operand_itemsize) + itemsize * d)
    if not plan.keeps_logits:
        # The logits are made twice, and the inputs' gradient is added to by every block of classes.
        passes = 2 * n * v * (2 * itemsize) + n * v * operand_itemsize
        sums = of_inputs if is_narrow else 0
        return Cost(4 * one, 2 * pieces * of_inputs, passes, chunk + block + sums)
    passes = n * v * (2 * itemsize + operand_itemsize)
    sums = of_kernel if is_narrow else 0
    return Cost(
        3 * one,
        2 * chunks * of_kernel + 2 * pieces * of_inputs,
        passes,
        plan.tokens * v * itemsize + chunk + block + sums,
    )
