"""`python -m xentjax bench --head-plan`: how heads are cut up, and the cost that is predicted."""

import math
from collections.abc import Iterator, Sequence

import jax.numpy as jnp

from xentjax._commands.bench.cases import FULL
from xentjax._explain.text import definitions, paragraph, table
from xentjax._softmax.head_plan import ACCELERATOR, Sizes, make_plan, predict

HEADINGS = (
    "",
    "tokens ×\nchunks",
    "classes ×\nblocks",
    "logits",
    "TFLOP",
    "sums,\nGiB",
    "sums ÷\nmatmuls",
    "logits,\nGiB",
    "temp.,\nGiB",
)
LEGEND = (
    ("tokens", "in a chunk; its logits are kept for the gradients, or recomputed"),
    ("classes", "in a block"),
    ("TFLOP", "10¹² operations of the matmuls, for the loss with both gradients"),
    ("sums", "gradients that chunks and blocks add to: read and written"),
    ("÷", "in time, at 250 operations for each byte: an H100's in bfloat16"),
    ("logits", "logits and their gradients: read and written, beside the matmuls"),
    ("temp.", "temporaries beside arguments and results"),
)
PLANS = {
    "CPU": {},
    "accelerator": {"machine": ACCELERATOR},
    "budget 0": {"memory_budget": 0},
}
"""Options of plans, by the name of a row."""


def tables(heads: Sequence[tuple[int, int, int]]) -> Iterator[str]:
    """Yields the lines of a table for each head and dtype, and of their legend.

    A head is (tokens, features, classes); () stands for those that the benchmark measures.
    """
    measured = [row.size for row in FULL.rows + FULL.large if "head" in row.losses]
    for head in heads or dict.fromkeys((n, d, v) for n, v, d in measured):
        for dtype in ("float32", "bfloat16"):
            yield from paragraph(f"head {' × '.join(map(str, head))} {dtype}")
            rows = [HEADINGS, *([name, *cells(head, dtype, name)] for name in PLANS)]
            yield from (*table([list(column) for column in zip(*rows, strict=True)]), "")
    yield from definitions(LEGEND)


def cells(head: tuple[int, int, int], dtype: str, name: str) -> list[str]:
    """Returns the row of a plan, without its name."""
    sizes = Sizes(*head)
    plan = make_plan(sizes, **PLANS[name])
    cost = predict(plan, sizes, jnp.dtype(dtype).itemsize)
    gib = (x / 2**30 for x in (cost.accumulator, cost.logits, cost.temporaries))
    sums, logits, temporaries = (f"{x:.{1 if x >= 10 else 2}f}" for x in gib)
    return [
        f"{plan.tokens} × {math.ceil(sizes.tokens / plan.tokens)}",
        f"{plan.classes} × {math.ceil(sizes.classes / plan.classes)}",
        "kept" if plan.keeps_logits else "recomputed",
        f"{cost.matmuls / 1e12:.3g}",
        sums,
        "–" if name == "CPU" else f"{cost.share():.1%}",
        logits,
        temporaries,
    ]
