"""Contrast: cross-entropy over the similarities of a batch, which are never all in memory.

The similarities of two batches are dot products over a temperature; normalise the embeddings first
for cosines. Each function takes one block of rows at a time, [rows, N].
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from xentjax._jax import checks
from xentjax._jax import mesh as meshes
from xentjax._jax.dtypes import wide, wide_dtype
from xentjax._jax.mesh import AxisName
from xentjax._losses import logit_transform
from xentjax._losses.linear import linear_softmax_cross_entropy
from xentjax._softmax import reference
from xentjax._softmax.partial import masked
from xentjax._targets.mass import DenseMass

ROWS = 256
"""So many rows of similarities are in memory at once."""


def info_nce(
    queries: ArrayLike,
    keys: ArrayLike,
    *,
    temperature: ArrayLike,
    symmetric: bool = False,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, " n"]:
    """InfoNCE: each query against all keys, of which its own is the key of the same row.

    loss_i = −log ( exp(q_i · k_i / τ) / Σ_j exp(q_i · k_j / τ) )

    With symmetric=True it is CLIP's loss, the mean of this and of keys against queries.
    `linear_softmax_cross_entropy` makes the similarities block by block, with keys for the kernel;
    its mean takes three matmuls with the gradient where one loss for each query takes four.

    Args:
      queries: float[N, D]; normalise rows first for cosine similarity.
      keys: float[M, D], M ≥ N: the first N belong to the queries, and more are negatives of all. M
        is N if symmetric.
      temperature: τ, a positive scalar; it may be traced and differentiated.
      symmetric: Whether keys are held against queries too.
      where: Pairs to keep, bool[N]; the others have loss 0, and are nobody's negatives.
      axis_name: Mapped axes, inside `jax.shard_map`, `jax.vmap` or `jax.pmap`, whose devices have
        pairs of their own; each query then meets the keys of all devices, which are gathered.

    Returns:
      Losses in nats, one for each query of this device, float32 (float64 for float64).

    Raises:
      ValueError: Shapes do not fit, or temperature is not a positive scalar.
      TypeError: An array is not floating-point, where is not bool, or symmetric is not a flag.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> images, texts = jnp.eye(3), jnp.eye(3)
      >>> losses = xentjax.info_nce(images, texts, temperature=0.5, symmetric=True)
      >>> print(losses.round(4))
      [0.2395 0.2395 0.2395]

    Source:
      van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018,
      equation 4; Radford et al., CLIP, 2021, figure 3.
    """
    queries, keys = _as_embeddings("queries", queries), _as_embeddings("keys", keys)
    checks.check_flag("symmetric", symmetric)
    tau = checks.as_positive("temperature", temperature)
    (num_pairs, features), num_keys = queries.shape, keys.shape[0]
    checks.check_known("queries", features, "features")
    checks.check_known("keys", num_keys, "rows")
    wanted = f"{num_pairs} keys, one for each query," if symmetric else f"at least {num_pairs} keys"
    checks.check(
        keys.shape[1] == features
        and (num_keys == num_pairs if symmetric else num_keys >= num_pairs),
        f"keys: expected {wanted} of {features} features, got {checks.describe(keys)}",
    )
    where = _as_mask(where, num_pairs, "queries")
    axes = None if axis_name is None else meshes.mapped_axes(axis_name)
    losses = _info_nce(queries, keys, tau, where, axes)
    if not symmetric:
        return losses
    half = jnp.asarray(0.5, losses.dtype)
    return half * (losses + _info_nce(keys, queries, tau, where, axes))


def _info_nce(queries, keys, tau, where, axes):
    if keys.shape[0] == 0:
        return wide(queries).sum(-1)
    run = functools.partial(_against_keys, axes=axes)
    others = keys, tau, where
    return meshes.on_automatic_axes(run, queries, (1,), others)(queries, *others)


def _against_keys(queries, keys, tau, where, axes):
    num_pairs, num_keys = queries.shape[0], keys.shape[0]
    own = jnp.arange(num_pairs, dtype=jnp.int32)
    bias = None
    if where is not None:  # A key with a bias of −∞ is nobody's.
        is_kept = jnp.pad(where, (0, num_keys - num_pairs), constant_values=True)
        keys = masked(keys, is_kept)
        bias = jnp.where(is_kept, jnp.zeros(num_keys, wide_dtype(keys.dtype)), -jnp.inf)
    if axes is not None:
        own = own + jax.lax.axis_index(axes) * num_keys
        keys, bias = _gathered((keys, bias), axes)
    return linear_softmax_cross_entropy(
        queries,
        keys,
        own,
        bias=bias,
        class_axis=0,
        where=where,
        reduction="none",
        logit_transform=logit_transform.temperature(tau),
    )


def nt_xent(
    embeddings: ArrayLike,
    labels: ArrayLike | Sequence[int],
    *,
    temperature: ArrayLike,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, " n"]:
    """NT-Xent: each embedding and one of its label, against those of other labels.

    loss_i = mean over j ≠ i, y_j = y_i, of log(1 + Σ_{k: y_k ≠ y_i} exp((s_ik − s_ij) / τ))

    s_ij = x_i · x_j. In SimCLR, labels are the numbers of the images, and each has two views.
    `weighted_mean(losses, weights=pairs)`, where `pairs` counts each row's partners, is the mean
    over pairs that `optax.losses.ntxent` returns, of embeddings that are normalised.

    Args:
      embeddings: x, float[N, D]; normalise rows first for cosine similarity.
      labels: The label of each embedding, int[N].
      temperature: τ, a positive scalar; it may be traced and differentiated.
      where: Embeddings to keep, bool[N]; the others have loss 0, and are nobody's partners.
      axis_name: As in `info_nce`: embeddings of all devices are gathered, and this device's are
        held against them.

    Returns:
      Losses in nats, float[N]: 0 for an embedding without a partner; float32 (float64 for float64).

    Raises:
      ValueError: Shapes do not fit, or temperature is not a positive scalar.
      TypeError: embeddings are not floating-point, labels are not integers, or where is not bool.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> views = jnp.eye(2)[jnp.array([0, 1, 0, 1])]
      >>> print(xentjax.nt_xent(views, jnp.array([0, 1, 0, 1]), temperature=0.5).round(4))
      [0.2395 0.2395 0.2395 0.2395]

    Source:
      Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, 2020,
      equation 1.
    """
    return _of_labels(_nt_xent_of_row, embeddings, labels, temperature, where, axis_name)


def supervised_contrastive(
    embeddings: ArrayLike,
    labels: ArrayLike | Sequence[int],
    *,
    temperature: ArrayLike,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, " n"]:
    """Supervised contrastive loss: each embedding and those of its label, against all others.

    loss_i = mean over j ≠ i, y_j = y_i, of −log(exp(s_ij / τ) / Σ_{k≠i} exp(s_ik / τ))

    s_ij = x_i · x_j. It is cross-entropy with all partners as the target. In `nt_xent`, other
    partners are not among the negatives.

    Args:
      embeddings: x, float[N, D]; normalise rows first for cosine similarity.
      labels: The label of each embedding, int[N].
      temperature: τ, a positive scalar; it may be traced and differentiated.
      where: Embeddings to keep, bool[N]; the others have loss 0, and are nobody's partners.
      axis_name: As in `nt_xent`.

    Returns:
      Losses in nats, float[N]: 0 for an embedding without a partner; float32 (float64 for float64).

    Raises:
      ValueError: Shapes do not fit, or temperature is not a positive scalar.
      TypeError: embeddings are not floating-point, labels are not integers, or where is not bool.

    Example:
      >>> import jax.numpy as jnp
      >>> import xentjax
      >>> x = jnp.eye(2)[jnp.array([0, 1, 0])]
      >>> loss = xentjax.supervised_contrastive(x, jnp.array([0, 1, 0]), temperature=0.5)
      >>> print(loss.round(4))
      [0.1269 0.     0.1269]

    Source:
      Khosla et al., Supervised Contrastive Learning, 2020, equation 2.
    """
    return _of_labels(_supervised_of_row, embeddings, labels, temperature, where, axis_name)


def _of_labels(loss_of_row, embeddings, labels, temperature, where, axis_name):
    """Returns loss_of_row(similarities [M], partners [M], strangers [M]) of every embedding."""
    x = _as_embeddings("embeddings", embeddings)
    labels = checks.as_array("labels", labels, "integer labels")
    checks.check(
        jnp.issubdtype(labels.dtype, jnp.integer),
        f"labels: expected integer labels, got {checks.describe(labels)}",
        TypeError,
    )
    checks.check_shape("labels", labels, x.shape[:1], "one for each of embeddings")
    tau = checks.as_positive("temperature", temperature)
    where = _as_mask(where, x.shape[0], "embeddings")
    axes = None if axis_name is None else meshes.mapped_axes(axis_name)
    run = functools.partial(_by_blocks_of_rows, loss_of_row=loss_of_row, axes=axes)
    others = labels, tau, where
    return meshes.on_automatic_axes(run, x, (1,), others)(x, *others)


@functools.partial(jax.jit, static_argnames=("loss_of_row", "axes"))
def _by_blocks_of_rows(x, labels, tau, where, loss_of_row, axes):
    x = wide(masked(x, where))
    if x.shape[0] == 0:
        return x.sum(-1)
    number = jnp.arange(x.shape[0], dtype=jnp.int32)
    keep = jnp.ones(x.shape[0], bool) if where is None else where
    if axes is not None:
        number = number + jax.lax.axis_index(axes) * x.shape[0]
    rows = x / tau.astype(x.dtype), labels, number, keep
    every, every_label, every_number, every_keep = (
        (x, labels, number, keep) if axes is None else _gathered((x, labels, number, keep), axes)
    )

    @jax.checkpoint
    def of_row(row):
        query, label, own, keep = row
        others = every_keep & (every_number != own)
        is_partner = others & (every_label == label)
        is_stranger = others & (every_label != label)
        return jnp.where(keep, loss_of_row(every @ query, is_partner, is_stranger), 0)

    is_known = isinstance(x.shape[0], int)  # It is not under `jax.export`, where each row is alone.
    return jax.lax.map(of_row, rows, batch_size=min(ROWS, x.shape[0]) if is_known else None)


def _nt_xent_of_row(similarities, is_partner, is_stranger):
    strangers = jnp.where(is_stranger, similarities, -jnp.inf)
    _, top, terms = reference.leader_and_rest(strangers)
    lse = top + jnp.log1p(terms.sum(-1))
    pairs = is_partner & is_stranger.any()
    of_pairs = jnp.where(pairs, jax.nn.softplus(jnp.where(pairs, lse - similarities, 0)), 0)
    return of_pairs.sum() / jnp.maximum(is_partner.sum(dtype=of_pairs.dtype), 1)


def _supervised_of_row(similarities, is_partner, is_stranger):
    count = jnp.maximum(is_partner.sum(dtype=similarities.dtype), 1)
    targets = DenseMass(is_partner.astype(similarities.dtype) / count)
    others = jnp.where(is_partner | is_stranger, similarities, -jnp.inf)
    return reference.cross_entropy(others, targets)[0]


def _as_embeddings(name, x):
    """Returns embeddings float[N, D]."""
    x = checks.as_array(name, x)
    checks.check_floating(name, x)
    checks.check(x.ndim == 2, f"{name}: expected shape [N, D], got {checks.describe(x)}")
    return x


def _as_mask(where, size, name):
    """Returns a mask of rows, or None."""
    if where is None:
        return None
    where = checks.as_array("where", where, "a bool array")
    checks.check_bool("where", where)
    checks.check_shape("where", where, (size,), f"one for each of {name}")
    return where


def _gathered(tree, axes):
    """Returns the rows of all devices, one after the other."""
    return jax.tree.map(functools.partial(jax.lax.all_gather, axis_name=axes, tiled=True), tree)
