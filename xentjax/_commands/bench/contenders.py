"""The contenders of `python -m xentjax bench`: each loss, as the users of each library write it.

A contender is a function from logits (for the head: from inputs and kernel) and targets to the mean
loss, in float32.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import xentjax

SMOOTHING = 0.1


class Foreign(NamedTuple):
    """A contender of a package that may be missing.

    Attributes:
      module: The name to import.
      name: An attribute that it must have, with dots.
      function: (the imported package, *arguments) -> the mean loss.
    """

    module: str
    name: str
    function: Callable[..., Any]

    def load(self) -> ModuleType | None:
        """Returns the package; None if it is missing or too old."""
        try:
            package = importlib.import_module(self.module)
            functools.reduce(getattr, self.name.split("."), package)
        except (ImportError, OSError, AttributeError):  # OSError: a library that it links to.
            return None
        return package


def _wide(z):
    return z.astype(jnp.float32)


def _one_hot(labels, z):
    return jax.nn.one_hot(labels, z.shape[-1])


def _log_probability(z, *several):
    """Returns log_softmax(z), and its entries at labels, for each of several."""
    log_p = jax.nn.log_softmax(_wide(z))
    return log_p, *(jnp.take_along_axis(log_p, y[:, None], -1)[:, 0] for y in several)


def _cross_entropy(torch, z, targets, **options):
    """PyTorch's, of whatever kind of targets."""
    return torch.nn.functional.cross_entropy(z.float(), targets, **options)


def _torch(function):
    return Foreign("torch", "nn.functional.cross_entropy", function)


def _mean_where(losses, where):
    return jnp.where(where, losses, 0).sum() / where.sum()


def _xentjax_masked(z, y, where):
    losses = xentjax.softmax_cross_entropy(z, y, where=where)
    return xentjax.weighted_mean(losses, where=where)


def _xentjax_mixup(z, a, b, share):
    return xentjax.softmax_cross_entropy(z, xentjax.mix_targets(a, b, share)).mean()


def _optax_mixup(z, a, b, share):
    targets = share * _one_hot(a, z) + (1 - share) * _one_hot(b, z)
    return optax.softmax_cross_entropy(_wide(z), targets).mean()


def _plain_mixup(z, a, b, share):
    _, log_a, log_b = _log_probability(z, a, b)
    return -(share * log_a + (1 - share) * log_b).mean()


def _torch_mixup(torch, z, a, b, share):
    return share * _cross_entropy(torch, z, a) + (1 - share) * _cross_entropy(torch, z, b)


def _plain_smoothing(z, y):
    log_p, log_y = _log_probability(z, y)
    return -((1 - SMOOTHING) * log_y + SMOOTHING * log_p.mean(-1))


def _plain_excluded(z, t):
    surprisals = -jax.nn.log_softmax(_wide(z))
    return (t * jnp.where(t > 0, surprisals, 0)).sum(-1).mean()


def _torch_excluded(torch, z, t):
    finite = z.float().clamp(min=torch.finfo(torch.float32).min)
    return _cross_entropy(torch, finite, t)


def _plain_binary(z, t):
    return -(t * jax.nn.log_sigmoid(_wide(z)) + (1 - t) * jax.nn.log_sigmoid(-_wide(z)))


def _torch_binary(torch, z, t):
    return torch.nn.functional.binary_cross_entropy_with_logits(z.float(), t, reduction="sum")


def _logits_of(inputs, kernel):
    return jnp.matmul(inputs, kernel, preferred_element_type=jnp.float32)


def _torch_fused(torch, inputs, kernel, y):
    options = torch.nn.LinearCrossEntropyOptions()
    return torch.nn.functional.linear_cross_entropy(inputs, kernel.T, y, options=options)


def _tokamax(tokamax, inputs, kernel, y):
    implementation = "mosaic_tpu" if jax.default_backend() == "tpu" else "chunked_xla"
    return tokamax.linear_softmax_cross_entropy_loss(
        inputs, y, kernel, reduction="mean", implementation=implementation
    )


_optax_labels = optax.softmax_cross_entropy_with_integer_labels

_MASKED_HEAD = {
    "xentjax": lambda x, w, y, where: xentjax.linear_softmax_cross_entropy(x, w, y, where=where),
    "optax": lambda x, w, y, where: _mean_where(_optax_labels(_logits_of(x, w), y), where),
}

CONTENDERS: dict[str, dict[str, Callable[..., Any] | Foreign]] = {
    "eager": {  # The cost of one call: not compiled, and one loss per example.
        "xentjax": xentjax.softmax_cross_entropy,
        "optax": _optax_labels,
        "jax.nn": lambda z, y: -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], -1)[:, 0],
        "torch": _torch(
            lambda torch, z, y: torch.nn.functional.cross_entropy(z, y, reduction="none")
        ),
    },
    "eager-smoothing": {
        "xentjax": lambda z, y: xentjax.softmax_cross_entropy(
            z, xentjax.smooth_labels(y, SMOOTHING)
        ),
        "optax": lambda z, y: optax.softmax_cross_entropy(
            z, optax.smooth_labels(_one_hot(y, z), SMOOTHING)
        ),
        "jax.nn": _plain_smoothing,
        "torch": _torch(
            lambda torch, z, y: torch.nn.functional.cross_entropy(
                z, y, label_smoothing=SMOOTHING, reduction="none"
            )
        ),
    },
    "labels": {
        "xentjax": lambda z, y: xentjax.softmax_cross_entropy(z, y).mean(),
        "optax": lambda z, y: _optax_labels(_wide(z), y).mean(),
        "jax.nn": lambda z, y: -_log_probability(z, y)[1].mean(),
        "torch": _torch(_cross_entropy),
    },
    "masked": {
        "xentjax": _xentjax_masked,
        "optax": lambda z, y, where: _mean_where(_optax_labels(_wide(z), y), where),
        "jax.nn": lambda z, y, where: _mean_where(-_log_probability(z, y)[1], where),
        "torch": _torch(lambda t, z, y, where: _cross_entropy(t, z, y.masked_fill(~where, -100))),
    },
    "smoothing": {
        "xentjax": lambda z, y: xentjax.softmax_cross_entropy(
            z, xentjax.smooth_labels(y, SMOOTHING)
        ).mean(),
        "optax": lambda z, y: optax.softmax_cross_entropy(
            _wide(z), optax.smooth_labels(_one_hot(y, z), SMOOTHING)
        ).mean(),
        "jax.nn": lambda z, y: _plain_smoothing(z, y).mean(),
        "torch": _torch(lambda t, z, y: _cross_entropy(t, z, y, label_smoothing=SMOOTHING)),
    },
    "mixup": {
        "xentjax": _xentjax_mixup,
        "optax": _optax_mixup,
        "jax.nn": _plain_mixup,
        "torch": _torch(_torch_mixup),
    },
    "dense": {
        "xentjax": lambda z, t: xentjax.softmax_cross_entropy(z, t).mean(),
        "optax": lambda z, t: optax.softmax_cross_entropy(_wide(z), t).mean(),
        "jax.nn": lambda z, t: -(t * jax.nn.log_softmax(_wide(z))).sum(-1).mean(),
        "torch": _torch(_cross_entropy),
    },
    "excluded": {  # Classes that cannot be: their logits are −inf, and no target has them.
        "xentjax": lambda z, t: xentjax.softmax_cross_entropy(z, t).mean(),
        "optax": lambda z, t: optax.safe_softmax_cross_entropy(_wide(z), t).mean(),
        "jax.nn": _plain_excluded,
        "torch": _torch(_torch_excluded),
    },
    "binary": {
        "xentjax": lambda z, t: xentjax.sigmoid_binary_cross_entropy(z, t).mean(),
        "optax": lambda z, t: optax.sigmoid_binary_cross_entropy(_wide(z), t).mean(),
        "jax.nn": lambda z, t: _plain_binary(z, t).mean(),
        "torch": _torch(lambda torch, z, t: _torch_binary(torch, z, t) / len(z)),
    },
    "multilabel": {
        "xentjax": lambda z, t: xentjax.multilabel_cross_entropy(z, t).mean(),
        "optax": lambda z, t: optax.sigmoid_binary_cross_entropy(_wide(z), t).sum(-1).mean(),
        "jax.nn": lambda z, t: _plain_binary(z, t).sum(-1).mean(),
        "torch": _torch(lambda torch, z, t: _torch_binary(torch, z, t) / len(z)),
    },
    "head-10": _MASKED_HEAD,  # So many tokens in a hundred are masked.
    "head-50": _MASKED_HEAD,
    "head-90": _MASKED_HEAD,
    "head": {
        "xentjax": xentjax.linear_softmax_cross_entropy,
        "optax": lambda x, w, y: _optax_labels(_logits_of(x, w), y).mean(),
        "jax.nn": lambda x, w, y: -_log_probability(_logits_of(x, w), y)[1].mean(),
        "torch": _torch(lambda torch, x, w, y: _cross_entropy(torch, x @ w, y)),
        "torch fused": Foreign("torch", "nn.LinearCrossEntropyOptions", _torch_fused),
        "tokamax": Foreign("tokamax", "linear_softmax_cross_entropy_loss", _tokamax),
    },
}
