"""The head's plan on two kinds of machine, and its predicted cost beside the compiled program's."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

import xentjax
from xentjax._losses import linear
from xentjax._softmax.head_plan import ACCELERATOR, CPU, HeadPlan, Sizes, make_plan, predict


def test_on_accelerators_the_accumulator_costs_little():
    # Gemma 2, Llama 3 (8B), and 32768 tokens of 2560 features; bfloat16.
    for tokens, features, classes in [
        (8192, 2304, 256000),
        (16384, 4096, 128256),
        (32768, 2560, 128256),
    ]:
        sizes = Sizes(tokens, features, classes)
        plan, of_cpu = (make_plan(sizes, machine=machine) for machine in (ACCELERATOR, CPU))
        cost = predict(plan, sizes, operand_itemsize=2)
        assert plan.keeps_logits
        assert plan.tokens >= 2048
        assert cost.share() <= 0.19
        assert predict(of_cpu, sizes, operand_itemsize=2).share() >= 0.5
        assert cost.temporaries <= 4.5 * 2**30
    # Matmuls and sums in 100 ms at an H100's 750 TFLOP/s, for the last.
    assert cost.matmuls * (1 + cost.share()) / 750e12 <= 0.1
    assert cost.temporaries <= 3 * 2**30


def test_little_traffic_and_little_memory_exclude_each_other():
    """As ACCELERATOR says: over all even chunks and blocks of a head of Llama 3 (8B)."""
    sizes = Sizes(tokens=16384, features=4096, classes=128256)
    tokens, classes = (
        {128 * math.ceil(size / count / 128) for count in range(1, 129)}
        for size in (sizes.tokens, sizes.classes)
    )
    costs = [
        predict(HeadPlan(n, v, True), sizes, operand_itemsize=2)
        for n, v in itertools.product(tokens, classes)
    ]
    assert min(c.temporaries for c in costs if c.share() <= 0.15) > 3.7 * 2**30
    assert min(c.share() for c in costs if c.temporaries <= 3 * 2**30) > 0.24


def test_a_budget_is_kept_on_every_machine():
    sizes = Sizes(8192, 2304, 256000)
    for budget in (0, 2**28, 2**32):
        assert make_plan(sizes, budget) == make_plan(sizes, budget, machine=ACCELERATOR)


def test_a_budget_is_for_every_platform():
    arrays = linear.as_arrays(
        np.ones((300, 4)), np.ones((4, 500)), np.zeros(300, int), None, None, None
    )
    for budget in (None, 0, 10**6):
        head = linear.prepare(arrays, linear.Options(memory_budget=budget)).head
        expected = make_plan(Sizes(300, 4, 500), budget, machine=ACCELERATOR)
        assert head.on("portable").plan == expected


def test_the_arrays_of_a_block_fit_a_quarter_of_the_budget():
    """Two arrays of logits for each that is kept, and one of each kernel."""
    for teacher, budget, tokens in itertools.product((0, 3000), (2**28, 2**30), (64, 9000)):
        plan = make_plan(Sizes(tokens, 1000, 50000, teacher_features=teacher), budget)
        accumulator = 4 * 1000 * 50000 if plan.keeps_logits else 0
        numbers_of_a_class = 2 * plan.tokens * (2 if teacher else 1) + 1000 + teacher
        fitting = (budget - accumulator) // 4 // (4 * numbers_of_a_class)
        # Even pieces are multiples of 128.
        assert fitting / 2 < plan.classes < fitting + 128


def test_lowered_code_has_the_chunks_of_its_platform():
    x, w, y = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in [
            ((16384, 64), jnp.bfloat16),
            ((64, 128256), jnp.bfloat16),
            ((16384,), jnp.int32),
        ]
    )
    step = jax.jit(jax.value_and_grad(xentjax.linear_softmax_cross_entropy, (0, 1)))
    for platform, tokens in (("cpu", 512), ("cuda", 2432), ("tpu", 2432)):
        exported = jax.export.export(step, platforms=(platform,))(x, w, y)
        text = exported.mlir_module()
        assert f"tensor<{tokens}x128256xf32>" in text
        # Matmuls have narrow operands and float32 sums, backward too.
        dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        assert len(dots) >= 3
        assert all(line.count("xbf16>") == 2 and line.count("xf32>") == 1 for line in dots)


# The predicted cost.


def compiled_cost(tokens, features, classes, memory_budget):
    """Returns (operations, bytes accessed) of a compiled float32 head with its gradients."""

    def loss(inputs, kernel, labels):
        return xentjax.linear_softmax_cross_entropy(
            inputs, kernel, labels, memory_budget=memory_budget
        )

    args = [
        jax.ShapeDtypeStruct((tokens, features), jnp.float32),
        jax.ShapeDtypeStruct((features, classes), jnp.float32),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    ]
    analysis = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*args).compile().cost_analysis()
    return analysis["flops"], analysis["bytes accessed"]


def predicted_cost(tokens, features, classes, keeps_logits):
    """Returns (operations, bytes accessed) of one chunk and one block, matmuls and all."""
    sizes = Sizes(tokens, features, classes)
    cost = predict(HeadPlan(tokens, classes, keeps_logits), sizes, operand_itemsize=4)
    # Each matmul reads two of the three matrices and writes the third.
    matmuls = cost.matmuls // (2 * tokens * features * classes)
    matrices = 4 * (tokens * features + features * classes + tokens * classes)
    return cost.matmuls, matmuls * matrices + cost.accumulator + cost.logits


def test_the_compiled_cost_of_kept_logits_is_as_predicted():
    """In one chunk and one block: the analysis counts the body of a loop once.

    The CPU's passes read the logits three times more, for a maximum, a label and a sum. They do so
    whatever the features: bytes grow with the features as predicted, sums and matmuls alike.
    """
    sizes, more = (256, 512, 1024), (256, 1024, 1024)
    for head in (sizes, more):
        assert make_plan(Sizes(*head)) == (256, 1024, True)
    (operations, fewer), (_, many) = (compiled_cost(*head, None) for head in (sizes, more))
    (expected, low), (_, high) = (predicted_cost(*head, True) for head in (sizes, more))
    np.testing.assert_allclose(operations, expected, rtol=0.01)
    np.testing.assert_allclose(many - fewer, high - low, rtol=0.01)
    assert low <= fewer <= 1.5 * low


def test_the_compiled_cost_of_recomputed_logits_is_as_predicted():
    """In three blocks, one of which is counted: XLA would not recompute the logits of one alone.

    Over the prediction are the loop's copies of a block of the kernel and of its gradient, and the
    reads of each product before it is added: a half more where tokens outnumber the block.
    """
    tokens, features, block = 1024, 512, 128
    assert make_plan(Sizes(tokens, features, 3 * block), 0) == (tokens, block, False)
    operations, found = compiled_cost(tokens, features, 3 * block, 0)
    expected, predicted = predicted_cost(tokens, features, block, False)
    np.testing.assert_allclose(operations, expected, rtol=0.01)
    assert predicted <= found <= 1.5 * predicted
