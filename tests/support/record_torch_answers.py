"""Records what PyTorch's losses and gradients are: `python tests/support/record_torch_answers.py`.

`test_torch.py` compares with what is recorded in `torch_answers.json`, so that it needs no PyTorch.
Each case holds its inputs, the options that the function was called with, and its answers: the
loss, and the gradient to the input of the sum of the losses.
"""

import importlib
import itertools
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

ANSWERS = pathlib.Path(__file__).with_name("torch_answers.json")
Case = dict[str, Any]

# As in PyTorch's own samples: a batch alone, and with one, two and three axes after the classes.
SHAPES = [(3,), (2, 3), (6, 4), (2, 3, 2), (2, 3, 1, 2), (2, 3, 1, 2, 3)]
REDUCTIONS = ["mean", "sum", "none"]


def cases() -> Iterator[Case]:
    """Yields every case without its answers; the numbers depend on the case alone."""
    for shape, soft in itertools.product(SHAPES, (False, True)):
        yield cross_entropy(shape, soft)
    made = [(), ("weight",), ("label_smoothing",), ("weight", "label_smoothing")]
    for options, soft in itertools.product(made, (False, True)):
        for reduction in REDUCTIONS if options in ((), ("weight",)) else ("mean", "none"):
            yield cross_entropy((6, 4), soft, *options, reduction=reduction)
        yield cross_entropy((2, 3, 2, 2), soft, *options)
    for options, ignored in itertools.product(made, (1, -100)):
        yield cross_entropy((6, 4), False, *options, ignore_index=ignored)
    yield cross_entropy((2, 3, 2, 2), False, "weight", ignore_index=-100, reduction="none")
    for shape in [(), (1,), (5,), (3, 4), (2, 3, 4)]:
        yield binary_cross_entropy(shape)
    for reduction in REDUCTIONS:
        yield binary_cross_entropy((3, 4), reduction=reduction, weight=(3, 1), pos_weight=(4,))
    for weight in [(1,), (1, 4), (4,), (3, 4)]:
        yield binary_cross_entropy((3, 4), reduction="none", weight=weight)
    for pos_weight in [(), (4,), (3, 4)]:
        yield binary_cross_entropy((3, 4), reduction="mean", pos_weight=pos_weight)


def generator(*key: Any) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def short(x: np.ndarray) -> Any:
    """Returns x as lists, of numbers that are the same in any format and float64."""
    return np.round(x, 3).tolist()


def cross_entropy(shape: tuple[int, ...], soft: bool, *made: str, **options: Any) -> Case:
    rng = generator(shape, soft, made, options)
    axis = 0 if len(shape) == 1 else 1
    num_classes = shape[axis]
    if soft:
        masses = rng.dirichlet(np.ones(num_classes), shape[:axis] + shape[axis + 1 :])
        target = short(np.moveaxis(masses, -1, axis))
    else:
        labels = rng.integers(0, num_classes, shape[:axis] + shape[axis + 1 :])
        ignored = options.get("ignore_index", 0)
        if ignored < 0:
            labels.flat[::3] = ignored
        target = labels.tolist()
    if "weight" in made:
        options["weight"] = short(rng.uniform(0.2, 3, num_classes))
    if "label_smoothing" in made:
        options["label_smoothing"] = 0.15
    logits = short(4 * rng.standard_normal(shape))
    return {"function": "cross_entropy", "input": logits, "target": target, "options": options}


def binary_cross_entropy(shape: tuple[int, ...], **options: Any) -> Case:
    rng = generator(shape, options)
    for name in ("weight", "pos_weight"):
        if name in options:
            options[name] = short(rng.uniform(0.2, 3, options[name]))
    target = rng.random(shape)
    return {
        "function": "binary_cross_entropy_with_logits",
        "input": short(6 * rng.standard_normal(shape)),
        "target": short(np.where(rng.random(shape) < 0.5, target, np.round(target))),
        "options": options,
    }


def answered(case: Case) -> Case:
    """Returns the case with PyTorch's loss and gradient, in float64."""
    torch = importlib.import_module("torch")

    def tensor(x: Any, **kwargs: Any) -> Any:
        array = np.asarray(x)
        return torch.tensor(array if array.dtype.kind == "i" else array.astype(float), **kwargs)

    logits = tensor(np.asarray(case["input"], float), requires_grad=True)
    options = {k: tensor(v) if k.endswith("weight") else v for k, v in case["options"].items()}
    function = getattr(torch.nn.functional, case["function"])
    loss = function(logits, tensor(case["target"]), **options)
    loss.sum().backward()
    return case | {"loss": loss.tolist(), "gradient": logits.grad.tolist()}


if __name__ == "__main__":
    rows = ",\n".join(json.dumps(answered(case)) for case in cases())
    ANSWERS.write_text(f"[\n{rows}\n]\n")
    print(f"{ANSWERS}: {rows.count(chr(10)) + 1} cases, {ANSWERS.stat().st_size} bytes")
