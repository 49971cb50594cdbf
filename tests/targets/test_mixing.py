"""mixup and CutMix: inputs and targets mixed alike, and drawn from what they say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from cases import jit, mainly, target_forms

import xentjax
from xentjax import SparseTargets

KEY = jax.random.key(7)
BATCH, CLASSES = 6, 5
assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
EACH = pytest.mark.parametrize("each", mainly([False, True], True))


def sparse(targets):
    assert isinstance(targets, SparseTargets)
    return targets


def plan_of(targets):
    """Returns (λ, π) as numbers, read off the targets that labels 0, 1, 2, … became."""
    targets = sparse(targets)
    indices, weights = np.asarray(targets.indices), np.asarray(targets.weights, float)
    assert indices.shape[-1] == 2
    np.testing.assert_array_equal(indices[..., 0], np.arange(indices.shape[-2]))
    assert_close(weights.sum(-1), 1)
    return weights[..., 0], indices[..., 1]


def column(lam, like):
    return lam.reshape(-1, *(1,) * (like.ndim - 1))


@EACH
def test_mixup_mixes_inputs_and_targets_alike(each):
    x = np.random.default_rng(0).standard_normal((BATCH, 3, 2)).astype(np.float32)
    mixed, targets = xentjax.mixup(KEY, x, jnp.arange(BATCH), 0.4, per_example=each)
    lam, order = plan_of(targets)
    assert sorted(order) == list(range(BATCH))
    assert len(set(lam)) == (BATCH if each else 1)
    share = column(lam, x)
    assert_close(mixed, share * x + (1 - share) * x[order])


def test_examples_that_share_a_background_have_one_when_mixed():
    prior = jnp.array([0.5, 0.25, 0.25])
    targets = xentjax.smooth_labels(jnp.array([0, 2, 1]), 0.1, background=prior)
    _, mixed = xentjax.mixup(KEY, jnp.ones((3, 2)), targets, 0.4)
    assert mixed.background.shape == targets.background.shape


@EACH
def test_mixup_of_a_pytree(each):
    """Every leaf by the same λ and π; dtypes and structure stay."""
    rng = np.random.default_rng(1)
    x = {
        "image": rng.standard_normal((BATCH, 4, 4)).astype(np.float32),
        "rest": (
            jnp.asarray(rng.standard_normal(BATCH), jnp.bfloat16),
            rng.standard_normal((BATCH, 2)).astype(np.float16),
        ),
    }
    mixed, targets = xentjax.mixup(KEY, x, jnp.arange(BATCH), 1.0, per_example=each)
    lam, order = plan_of(targets)
    assert jax.tree.structure(mixed) == jax.tree.structure(x)
    for before, after in zip(jax.tree.leaves(x), jax.tree.leaves(mixed), strict=True):
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        exact, share = np.asarray(before, float), column(lam, before)
        want = share * exact + (1 - share) * exact[order]
        half_ulp = float(jnp.finfo(before.dtype).eps) / 2
        np.testing.assert_allclose(after.astype(float), want, rtol=half_ulp, atol=1e-6)


@pytest.mark.parametrize("name", target_forms(BATCH, CLASSES))
def test_mixup_of_every_target_form(name):
    targets = target_forms(BATCH, CLASSES)[name]
    x = np.eye(BATCH, dtype=np.float32)
    # Inputs that are rows of the identity come out as the mixing matrix.
    matrix, mixed = xentjax.mixup(KEY, x, targets, 1.0, per_example=True)
    masses = np.asarray(xentjax.dense_targets(targets, CLASSES), float)
    got = xentjax.dense_targets(mixed, CLASSES)
    assert_close(got, np.asarray(matrix, float) @ masses)


@EACH
def test_mixup_of_a_label_per_pixel(each):
    """Targets of more axes than the batch: λ is still one an example."""
    labels = np.broadcast_to(np.arange(BATCH)[:, None, None], (BATCH, 2, 3))
    matrix, mixed = xentjax.mixup(
        KEY, np.eye(BATCH, dtype=np.float32), labels, 1.0, per_example=each
    )
    got = xentjax.dense_targets(mixed, BATCH)
    want = np.broadcast_to(np.asarray(matrix)[:, None, None], got.shape)
    assert_close(got, want)


@EACH
@pytest.mark.parametrize("shape", [(9, 7), (5, 16, 1, 2)])
def test_cutmix_pastes_a_box_and_counts_its_pixels(shape, each):
    # No two pixels are the same, so that each says where it comes from.
    images = np.arange(BATCH * np.prod(shape), dtype=np.float32).reshape(BATCH, *shape)
    own = set()
    for seed in range(4):
        mixed, targets = xentjax.cutmix(
            jax.random.key(seed), images, jnp.arange(BATCH), 1.0, per_example=each
        )
        lam, order = plan_of(targets)
        pasted = np.asarray(mixed) == images[order]
        kept = np.asarray(mixed) == images
        assert (pasted | kept).all()
        boxes = (pasted & ~kept).reshape(BATCH, *shape[:2], -1)
        moved = order != np.arange(BATCH)  # An example pasted into itself shows no box.
        for box, share in zip(boxes[moved], lam[moved], strict=True):
            np.testing.assert_array_equal(box.all(-1), box.any(-1))  # All channels, or none.
            rows, columns = box.any((1, 2)), box.any((0, 2))
            np.testing.assert_array_equal(box.all(-1), np.outer(rows, columns))
            for side in (rows, columns):  # One run of rows, one of columns.
                assert np.abs(np.diff(np.pad(side.astype(int), 1))).sum() in (0, 2)
            assert abs(share - (1 - box.mean())) <= 2**-23
            own.add(box.tobytes())
    assert len(own) > (4 if each else 1)


@pytest.mark.parametrize("name", mainly(target_forms(BATCH, CLASSES), "dense", "prior"))
def test_cutmix_of_every_target_form(name):
    targets = target_forms(BATCH, CLASSES)[name]
    # Images of one colour each: the mean over pixels is the mixing matrix.
    images = np.broadcast_to(np.eye(BATCH)[:, None, None], (BATCH, 6, 5, BATCH))
    mixed_images, mixed = xentjax.cutmix(KEY, images.astype(np.float32), targets, 1.0)
    matrix = np.asarray(mixed_images, float).mean((1, 2))
    masses = np.asarray(xentjax.dense_targets(targets, CLASSES), float)
    assert_close(xentjax.dense_targets(mixed, CLASSES), matrix @ masses)


AUGMENTATIONS = {"mixup": xentjax.mixup, "cutmix": xentjax.cutmix}
ALIKE = pytest.mark.parametrize("name", AUGMENTATIONS)
IMAGES = np.random.default_rng(2).standard_normal((BATCH, 6, 5, 3)).astype(np.float32)
LABELS = jnp.arange(BATCH)


@ALIKE
@EACH
def test_alpha_0_changes_nothing(name, each):
    mixed, targets = AUGMENTATIONS[name](KEY, IMAGES, LABELS, 0.0, per_example=each)
    np.testing.assert_array_equal(mixed, IMAGES)
    np.testing.assert_array_equal(xentjax.dense_targets(targets, BATCH), np.eye(BATCH))


@ALIKE
def test_a_batch_of_one_is_mixed_with_itself(name):
    mixed, targets = AUGMENTATIONS[name](KEY, IMAGES[:1], jnp.array([3]), 1.0)
    assert_close(mixed, IMAGES[:1])
    assert_close(xentjax.dense_targets(targets, 5), np.eye(5)[[3]])


@ALIKE
def test_under_jit(name):
    function = functools.partial(AUGMENTATIONS[name], per_example=name == "mixup")
    got, want = jax.jit(function)(KEY, IMAGES, LABELS, 0.7), function(KEY, IMAGES, LABELS, 0.7)
    jax.tree.map(assert_close, got, want)


@ALIKE
def test_keys(name, monkeypatch):
    """No two draws share a key, nor use the one that was given."""
    function, used = AUGMENTATIONS[name], []

    def spy(draw):
        def recorded(key, *args, **kwargs):
            used.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
            return draw(key, *args, **kwargs)

        return recorded

    draws = {"beta": lambda key, a, b, shape, dtype: jnp.full(shape, 0.5, dtype)}  # It is slow.
    for draw in ("beta", "bits", "uniform"):
        monkeypatch.setattr(jax.random, draw, spy(draws.get(draw, getattr(jax.random, draw))))
    with jax.disable_jit():  # A key that is traced has no numbers.
        function(KEY, IMAGES, LABELS, 1.0)
    assert len(used) == {"mixup": 2, "cutmix": 3}[name]
    assert len({*used, tuple(np.asarray(jax.random.key_data(KEY)).tolist())}) == len(used) + 1


@ALIKE
def test_a_key_decides_all(name):
    function = AUGMENTATIONS[name]
    first, raw = function(KEY, IMAGES, LABELS, 1.0), jax.random.key_data(KEY)
    jax.tree.map(np.testing.assert_array_equal, first, function(raw, IMAGES, LABELS, 1.0))
    other, _ = function(jax.random.key(8), IMAGES, LABELS, 1.0)
    assert not np.array_equal(first[0], other)


@ALIKE
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtype_is_kept(name, dtype):
    mixed, targets = AUGMENTATIONS[name](KEY, jnp.asarray(IMAGES, dtype), LABELS, 1.0)
    assert mixed.dtype == dtype
    assert sparse(targets).weights.dtype == jnp.float32


@ALIKE
@EACH
def test_alpha_0_spreads_neither_nan_nor_inf(name, each):
    images = IMAGES.copy()
    images[0, 0, 0, 0], images[1, 0, 0, 0] = np.inf, np.nan
    labels = LABELS.at[2].set(-100)
    mixed, targets = AUGMENTATIONS[name](KEY, images, labels, 0.0, per_example=each)
    np.testing.assert_array_equal(mixed, images)
    dense = xentjax.dense_targets(targets, BATCH)
    np.testing.assert_array_equal(np.isnan(dense).any(-1), np.arange(BATCH) == 2)


# Labels that are ignored.

IGNORED = np.array([False, True, False, True, False, False])
KEPT = ~IGNORED


@ALIKE
@EACH
def test_an_example_is_not_mixed_with_one_that_is_masked_out(name, each):
    """In every draw, and the mask that was given is that of the mixture."""
    labels = np.where(IGNORED, -100, np.arange(BATCH))
    images = np.broadcast_to(np.eye(BATCH, dtype=np.float32)[:, None, None], (BATCH, 6, 5, BATCH))
    function = functools.partial(AUGMENTATIONS[name], alpha=1.0, per_example=each, where=KEPT)
    mixtures = 0
    for key in jax.random.split(KEY, 8):
        mixed, targets = function(key, images, labels)
        matrix = np.asarray(mixed).mean((1, 2))
        # A row that is masked out stays as it is, and no other row has a part of it.
        np.testing.assert_array_equal(matrix[IGNORED], np.eye(BATCH)[IGNORED])
        np.testing.assert_array_equal(matrix[KEPT][:, IGNORED], 0)
        assert_close(xentjax.dense_targets(targets, BATCH)[KEPT], matrix[KEPT])
        losses = xentjax.softmax_cross_entropy(matrix, targets, where=KEPT)
        assert np.isfinite(losses).all()
        mixtures += (matrix.max(-1) < 1).sum()
    assert mixtures > 0


def test_a_token_keeps_its_target_where_the_other_is_masked_out():
    own = np.array([[0, -1, 1], [2, 3, -1], [-1, -1, -1], [4, 1, 0], [0, 0, -1], [-1, 2, 3]])
    keep, one_hot = own >= 0, np.eye(5)[own]
    mixed, targets = xentjax.mixup(KEY, np.eye(BATCH, dtype=np.float32), own, 1.0, where=keep)
    dense, matrix = np.asarray(xentjax.dense_targets(targets, 5)), np.asarray(mixed)
    pairs = 0
    for n, row in enumerate(matrix):
        lam, other = row[n], np.argmax(row * (np.arange(BATCH) != n))
        both = keep[n] & keep[other] & (lam < 1)
        want = np.where(both[:, None], lam * one_hot[n] + (1 - lam) * one_hot[other], one_hot[n])
        assert_close(dense[n][keep[n]], want[keep[n]])
        pairs += both.sum()
    assert pairs > 0
    np.testing.assert_array_equal(matrix[2], np.eye(BATCH)[2])


# The layout of images.


def test_cutmix_of_channels_first_is_that_of_channels_last():
    draw = functools.partial(xentjax.cutmix, KEY, targets=LABELS, alpha=1.0, per_example=True)
    last, targets = draw(IMAGES)
    for axes, image_axes in [
        ((0, 3, 1, 2), (2, 3)),
        ((0, 3, 1, 2), (-2, -1)),
        ((0, 2, 1, 3), (2, 1)),
    ]:
        moved, same = draw(IMAGES.transpose(axes), image_axes=image_axes)
        np.testing.assert_array_equal(moved, last.transpose(axes))
        jax.tree.map(np.testing.assert_array_equal, same, targets)


@pytest.mark.parametrize("image_axes", [(1, 2, 3), (1,), 2])
def test_cutmix_needs_two_image_axes(image_axes):
    with pytest.raises(TypeError, match="image_axes: expected two ints"):
        xentjax.cutmix(KEY, IMAGES, LABELS, 1.0, image_axes=image_axes)


@EACH
def test_cutmix_pastes_label_maps_by_the_box(each):
    """Ignored pixels too: their mask is pasted by the same key."""
    images = np.arange(BATCH * 6 * 5, dtype=np.int32).reshape(BATCH, 6, 5, 1)
    labels = images[..., 0] % 7
    draw = functools.partial(xentjax.cutmix, KEY, alpha=1.0, per_example=each)
    mixed, targets = draw(images, labels)
    assert sparse(targets).weights.shape == (BATCH, 6, 5, 1)
    np.testing.assert_array_equal(targets.weights, 1)
    np.testing.assert_array_equal(sparse(targets).indices, mixed % 7)
    assert not np.array_equal(mixed, images)
    _, dense = draw(images, jnp.asarray(np.eye(7, dtype=np.float32)[labels]))
    np.testing.assert_array_equal(dense, xentjax.dense_targets(targets, 7))
    mask, _ = draw(labels > 2, labels)
    np.testing.assert_array_equal(mask, np.asarray(mixed)[..., 0] % 7 > 2)


@pytest.mark.parametrize("dtype", mainly([np.uint8, np.int32, bool, np.float16], np.uint8))
def test_cutmix_of_images_of_any_dtype(dtype):
    images = (IMAGES * 40).astype(dtype)
    mixed, _ = xentjax.cutmix(KEY, images, LABELS, 1.0)
    want, _ = xentjax.cutmix(KEY, images.astype(np.float32), LABELS, 1.0)
    assert mixed.dtype == dtype
    np.testing.assert_array_equal(mixed.astype(np.float32), want)


def test_cutmix_shares_are_exact():
    """In [0, 1], and whole pixels over the area, where the box is the image too."""

    def draw(key):
        targets = xentjax.cutmix(key, jnp.zeros((1, 7, 11)), jnp.arange(1), 0.02)[1]
        return sparse(targets).weights[0]

    weights = np.asarray(jit(jax.vmap(draw))(jax.random.split(KEY, 500)))
    assert weights.min() == 0
    assert weights.max() == 1
    pixels = np.round(weights[:, 0] * 77).astype(np.float32)
    np.testing.assert_array_equal(weights[:, 0], pixels / np.float32(77))


# What is drawn.

DRAWS = 2000


@pytest.mark.parametrize("alpha", mainly([0.2, 3.0], 0.2))
def test_lam_is_beta_distributed(alpha):
    """Kolmogorov-Smirnov, one λ an example and one a batch; the keys are fixed."""
    zeros = np.zeros((DRAWS, 1), np.float32)
    _, targets = xentjax.mixup(KEY, zeros, np.zeros(DRAWS, int), alpha, per_example=True)

    def shared(key):
        return sparse(xentjax.mixup(key, zeros[:2], jnp.arange(2), alpha)[1]).weights[0, 0]

    for lam in (
        sparse(targets).weights[:, 0],
        jit(jax.vmap(shared))(jax.random.split(KEY, DRAWS)),
    ):
        assert ((lam >= 0) & (lam <= 1)).all()
        beta = scipy.stats.beta(alpha, alpha)
        assert scipy.stats.kstest(np.asarray(lam, float), beta.cdf).pvalue > 1e-3


def test_permutation_is_uniform_and_apart_from_lam():
    def draw(key):
        _, targets = xentjax.mixup(key, jnp.zeros((3, 1)), jnp.arange(3), 1.0)
        return sparse(targets).weights[0, 0], sparse(targets).indices[:, 1]

    lam, order = map(np.asarray, jit(jax.vmap(draw))(jax.random.split(KEY, DRAWS)))
    which, counts = np.unique(order, axis=0, return_counts=True)
    assert len(which) == 6
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    groups = [lam[(order == p).all(1)] for p in which]
    assert scipy.stats.kruskal(*groups).pvalue > 1e-3


def test_cutmix_area_is_distributed_as_its_definition_says():
    """Against a simulation: a box of area 1 − λ₀ at a uniform centre, cut at the border."""
    side, rng = 32, np.random.default_rng(3)

    def draw(key):
        _, targets = xentjax.cutmix(key, jnp.zeros((1, side, side)), jnp.arange(1), 1.0)
        return sparse(targets).weights[0, 0]

    lam = np.asarray(jit(jax.vmap(draw))(jax.random.split(KEY, DRAWS)), float)
    half = np.sqrt(1 - rng.beta(1, 1, 20 * DRAWS))[:, None] / 2
    centre = rng.random((20 * DRAWS, 2))
    low, high = (np.clip(np.round(side * (centre + s * half)), 0, side) for s in (-1, 1))
    simulated = 1 - np.prod(high - low, axis=1) / side**2
    assert float(np.asarray(scipy.stats.ks_2samp(lam, simulated))[1]) > 1e-3
