"""What the head costs, as compiled: memory, matmuls, layouts; and what low precision loses."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import jit, mainly, target_forms

import xentjax
from xentjax._softmax.head_plan import Sizes, make_plan, predict

loss_of = xentjax.linear_softmax_cross_entropy

# The table of Cut Your Losses in Large-Vocabulary Language Models: Gemma 2 (2B).
TOKENS, FEATURES, CLASSES = 8192, 2304, 256000
MIB = 2**20


@functools.cache
def compiled(
    tokens,
    features,
    classes,
    argnums=(0, 1),
    dtype=jnp.float32,
    class_axis=1,
    has_teacher=False,
    **kwargs,
):
    """Compiles the loss, and its gradients to `argnums` of (inputs, kernel), without arrays.

    A teacher has features and a kernel of the same shapes, in the place of the labels.
    """

    def function(inputs, kernel, targets):
        return jnp.sum(loss_of(inputs, kernel, targets, class_axis=class_axis, **kwargs))

    if argnums:
        function = jax.value_and_grad(function, argnums)
    kernel = (features, classes) if class_axis == 1 else (classes, features)
    head = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((tokens, features), kernel)]
    targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    if has_teacher:
        targets = xentjax.LinearTargets(*head, class_axis=class_axis)
    return jax.jit(function).lower(*head, targets).compile()


def temporaries(*args, **kwargs) -> float:
    """Returns MiB beside arguments and results."""
    return compiled(*args, **kwargs).memory_analysis().temp_size_in_bytes / MIB


# In bfloat16 and recomputed, the CPU compiler has all inputs in float32 too.
@pytest.mark.parametrize(
    ("dtype", "memory_budget"), [(jnp.float32, None), (jnp.bfloat16, None), (jnp.float32, 0)]
)
def test_temporaries_are_as_predicted(dtype, memory_budget):
    sizes = Sizes(TOKENS, FEATURES, CLASSES)
    plan = make_plan(sizes, memory_budget)
    cost = predict(plan, sizes, jnp.dtype(dtype).itemsize)
    found = temporaries(TOKENS, FEATURES, CLASSES, dtype=dtype, memory_budget=memory_budget)
    # The rest is the compiler's, and mostly a second copy of a block.
    assert 0.9 * cost.temporaries <= found * MIB <= 1.35 * cost.temporaries


LIMITS = {
    (jnp.float32, (0, 1)): (2900, 50),
    (jnp.bfloat16, (0, 1)): (3600, 320),
    (jnp.float32, ()): (300, 50),
    (jnp.bfloat16, ()): (300, 320),
}


@pytest.mark.parametrize(
    "case",
    mainly(
        [(*case, budget) for case in LIMITS for budget in (None, 0)],
        *[(*case, None) for case in LIMITS],
    ),
    ids=str,
)
def test_temporaries_of_a_large_vocabulary(case):
    dtype, argnums, memory_budget = case
    options = {"dtype": dtype, "memory_budget": memory_budget}
    options |= {} if argnums == (0, 1) else {"argnums": argnums}
    limit = LIMITS[dtype, argnums][0 if memory_budget is None else 1]
    assert temporaries(TOKENS, FEATURES, CLASSES, **options) <= limit


@pytest.mark.parametrize("argnums", [(), (0, 1)], ids=["loss", "gradients"])
def test_temporaries_do_not_grow_with_the_vocabulary(argnums):
    options = {"argnums": argnums, "memory_budget": 0}
    small, large = (
        temporaries(TOKENS, FEATURES, classes, **options) for classes in (CLASSES, 2 * CLASSES)
    )
    assert large <= small + 1


@pytest.mark.parametrize("argnums", [(), (0, 1)], ids=["loss", "gradients"])
def test_temporaries_grow_with_tokens_by_a_few_numbers_each(argnums):
    options = {"argnums": argnums, "memory_budget": 0}
    few, many = (temporaries(n, FEATURES, CLASSES, **options) for n in (TOKENS, 8 * TOKENS))
    # At most 16 float32 numbers for each token more.
    assert many - few <= 7 * TOKENS * 16 * 4 / MIB


@pytest.mark.parametrize("argnums", [(), (0, 1)], ids=["loss", "gradients"])
@pytest.mark.parametrize(
    "sizes",
    mainly(
        [(8 * TOKENS, CLASSES), (TOKENS, 2 * CLASSES), (TOKENS - 1, CLASSES - 1)],
        *[(8 * TOKENS, CLASSES), (TOKENS - 1, CLASSES - 1)],
    ),
    ids=str,
)
def test_the_default_budget_is_kept_at_any_size(sizes, argnums):
    tokens, classes = sizes
    # Twice the half GiB, and no accumulator: the kernel's gradient is summed where it is returned.
    assert temporaries(tokens, FEATURES, classes, argnums=argnums) <= 1024


@pytest.mark.parametrize(
    "case",
    mainly(
        itertools.product((jnp.float32, jnp.bfloat16), (None, 0)),
        *[(jnp.float32, None), (jnp.bfloat16, 0)],
    ),
    ids=str,
)
def test_a_kernel_of_rows_of_classes_is_not_transposed(case):
    dtype, memory_budget = case
    options = {"dtype": dtype, "memory_budget": memory_budget}
    tied = compiled(TOKENS, FEATURES, CLASSES, class_axis=0, **options)
    text = tied.as_text()
    assert f"[{FEATURES},{CLASSES}]" not in text
    assert f"[{CLASSES},{FEATURES}]{{0,1}}" not in text
    other = temporaries(TOKENS, FEATURES, CLASSES, **options)
    assert tied.memory_analysis().temp_size_in_bytes / MIB <= other + 1


@pytest.mark.parametrize(
    "case",
    mainly(
        itertools.product((4 * 515 * (8 + 2 * 128), 0), ("labels", "mixed", "prior")),
        *[(4 * 515 * (8 + 2 * 128), "labels"), (0, "prior")],
    ),
    ids=str,
)
def test_no_array_of_all_logits(case):
    memory_budget, form = case
    tokens, features, classes = 1100, 8, 515
    targets = target_forms(tokens, classes)[form]

    def function(inputs, kernel, targets):
        return loss_of(inputs, kernel, targets, memory_budget=memory_budget)

    inputs, kernel = jnp.zeros((tokens, features)), jnp.zeros((features, classes))
    lowered = jax.jit(jax.value_and_grad(function, (0, 1))).lower(inputs, kernel, targets)
    shapes = re.findall(r"[a-z]\w*\[([\d,]+)\]", lowered.compile().as_text())
    assert f"{tokens},{features}" in shapes
    largest = max(np.prod(list(map(int, shape.split(",")))) for shape in shapes)
    assert largest < tokens * classes


# In matmuls of all tokens by all classes. Elementwise work is some 20 operations for each logit,
# beside 2 · 1024 of a matmul.
MATMULS = {
    "kept": {(): 1, (0, 1): 3, (0,): 2, (1,): 2},
    "recomputed": {(): 1, (0, 1): 4, (0,): 3, (1,): 3},
}


@pytest.mark.parametrize("argnums", MATMULS["kept"], ids=str)
@pytest.mark.parametrize("way", MATMULS)
def test_matmuls_done(way, argnums):
    # The analysis counts the body of a loop once: the recomputed way has a loop of 3 blocks, since
    # XLA would not compute the logits of a single block again.
    tokens, features, block = 256, 1024, 128
    classes, budget = {"kept": (block, None), "recomputed": (3 * block, 0)}[way]
    plan = make_plan(Sizes(tokens, features, classes), budget)
    assert plan == (tokens, block, way == "kept")
    analysis = compiled(tokens, features, classes, argnums, memory_budget=budget).cost_analysis()
    matmuls = analysis["flops"] / (2 * tokens * features * block)
    np.testing.assert_allclose(matmuls, MATMULS[way][argnums], rtol=0.05)


@pytest.mark.parametrize(
    ("way", "argnums", "more"), [("kept", (0, 1), 1), ("recomputed", (0, 1), 2)]
)
def test_a_teacher_costs_at_most_two_matmuls_more(way, argnums, more):
    tokens, features, block = 256, 1024, 128
    classes, budget = {"kept": (block, None), "recomputed": (3 * block, 0)}[way]
    analysis = compiled(
        tokens, features, classes, argnums, memory_budget=budget, has_teacher=True
    ).cost_analysis()
    matmuls = analysis["flops"] / (2 * tokens * features * block)
    np.testing.assert_allclose(matmuls, MATMULS[way][argnums] + more, rtol=0.05)


def test_a_teacher_needs_little_more_memory():
    labels, teacher = (
        temporaries(TOKENS, FEATURES, CLASSES, has_teacher=has_teacher)
        for has_teacher in (False, True)
    )
    assert teacher <= 1.5 * labels


def low_precision(dtype, tokens, features, classes, scale):
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(tokens, features)), dtype)
    kernel = jnp.asarray(rng.normal(size=(features, classes)) * scale, dtype)
    labels = jnp.asarray(rng.integers(0, classes, tokens))

    def full(inputs, kernel):
        return xentjax.softmax_cross_entropy(inputs @ kernel, labels).mean()

    def fused(inputs, kernel, memory_budget):
        return loss_of(inputs, kernel, labels, memory_budget=memory_budget)

    return (inputs, kernel), full, fused


def errors(gradients, exact):
    """Returns, for each gradient, the relative error of all of it."""
    return [
        float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
        for a, b in zip(gradients, exact, strict=True)
    ]


@pytest.mark.parametrize(
    "case",
    mainly(
        itertools.product((jnp.bfloat16, jnp.float16), (None, 4 * 515 * (64 + 2 * 128), 0)),
        *[(jnp.bfloat16, None), (jnp.bfloat16, 0), (jnp.float16, 4 * 515 * (64 + 2 * 128))],
    ),
    ids=str,
)
def test_low_precision_is_no_worse_than_full_logits(case):
    dtype, memory_budget = case
    args, full, fused = low_precision(dtype, 300, 64, 515, 0.25)
    exact_args = [a.astype(jnp.float32) for a in args]
    exact_loss, exact = jit(jax.value_and_grad(full, (0, 1)))(*exact_args)
    ours = functools.partial(fused, memory_budget=memory_budget)
    loss, gradients = jax.jit(jax.value_and_grad(ours, (0, 1)))(*args)
    assert [loss.dtype, *(g.dtype for g in gradients)] == [jnp.float32, dtype, dtype]
    # The operands are what they are in float32, and so is every sum.
    np.testing.assert_allclose(loss, exact_loss, rtol=1e-6)
    of_full = errors(jax.grad(full, (0, 1))(*args), exact)  # Op by op: its logits are rounded.
    assert all(a <= b for a, b in zip(errors(gradients, exact), of_full, strict=True))


@pytest.mark.parametrize("memory_budget", [None, 0])
def test_float16_gradients_of_a_mean_of_many_tokens_do_not_underflow(memory_budget):
    # Each token's share, 1 / 16384 of a probability of 1 / 2048, is below float16's least number.
    args, full, fused = low_precision(jnp.float16, 16384, 16, 2048, 0.01)
    exact = jit(jax.grad(full, (0, 1)))(*(a.astype(jnp.float32) for a in args))
    ours = functools.partial(fused, memory_budget=memory_budget)
    gradients = jax.jit(jax.grad(ours, (0, 1)))(*args)
    # What float16 cannot hold of the result, and its rounding, 2⁻¹¹, of each operand.
    rounded = errors([g.astype(jnp.float16) for g in exact], exact)
    assert all(a <= b + 2**-10 for a, b in zip(errors(gradients, exact), rounded, strict=True))


@pytest.mark.parametrize(
    "case",
    mainly(
        [
            (*dtypes, memory_budget)
            for dtypes in (
                ("float32", "float64"),
                ("float64", "float32"),
                ("bfloat16", "float32"),
                ("float16", "bfloat16"),
            )
            for memory_budget in (None, 0)
        ],
        *[("float32", "float64", None), ("bfloat16", "float32", 0), ("float16", "bfloat16", None)],
    ),
    ids=str,
)
def test_operands_of_two_dtypes(case):
    inputs_dtype, kernel_dtype, memory_budget = case
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        inputs = jnp.asarray(rng.normal(size=(3, 4)), inputs_dtype)
        kernel = jnp.asarray(rng.normal(size=(4, 300)), kernel_dtype)
        labels = jnp.array([0, 299, 7])

        def function(inputs, kernel):
            losses, stats = xentjax.linear_softmax_cross_entropy_with_stats(
                inputs, kernel, labels, memory_budget=memory_budget
            )
            total = loss_of(inputs, kernel, labels, reduction="sum", memory_budget=memory_budget)
            return total, (losses, stats.log_normalizer, stats.label_log_probability)

        gradients_of = jit(jax.value_and_grad(function, (0, 1), has_aux=True))
        (total, each), gradients = gradients_of(inputs, kernel)
        wide = jnp.result_type(inputs_dtype, kernel_dtype, jnp.float32)
        assert {x.dtype for x in (total, *each)} == {wide}
        assert [g.dtype for g in gradients] == [inputs_dtype, kernel_dtype]
        logits = inputs.astype(jnp.float64) @ kernel.astype(jnp.float64)
        losses = xentjax.softmax_cross_entropy(logits, labels)
        np.testing.assert_allclose(each[0], losses, rtol=1e-12 if wide == jnp.float64 else 1e-5)
        np.testing.assert_allclose(total, losses.sum(), rtol=1e-12 if wide == jnp.float64 else 1e-5)


@pytest.mark.parametrize("memory_budget", mainly([None, 0], None))
def test_it_exports_to_every_platform(memory_budget):
    targets = target_forms(300, 515)["mixed"]

    @jax.jit
    def step(inputs, kernel, targets, cap):
        def loss(inputs, kernel):
            transform = xentjax.soft_cap(cap)
            return loss_of(
                inputs, kernel, targets, logit_transform=transform, memory_budget=memory_budget
            )

        return jax.value_and_grad(loss, (0, 1))(inputs, kernel)

    inputs, kernel = jnp.ones((300, 8), jnp.bfloat16), jnp.ones((8, 515), jnp.bfloat16)
    args = (inputs, kernel, targets, jnp.asarray(30.0))
    platforms = ("cpu", "cuda", "tpu", "rocm")
    exported = jax.export.export(step, platforms=platforms)(*args)
    assert exported.platforms == platforms
    jax.tree.map(np.testing.assert_array_equal, exported.call(*args), step(*args))
