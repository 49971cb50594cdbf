"""Cross-entropy and its family for JAX: exact, small in memory, right on every device."""

from xentjax._jax.checks import label_checks
from xentjax._losses.information import (
    cross_entropy,
    entropy,
    js_divergence,
    kl_divergence,
    perplexity,
    softmax_entropy,
    softmax_kl_divergence,
    softmax_surprisal,
    surprisal,
)
from xentjax._losses.linear import (
    LinearStats,
    linear_softmax_cross_entropy,
    linear_softmax_cross_entropy_with_stats,
)
from xentjax._losses.logit_transform import soft_cap, temperature
from xentjax._losses.reduction import WeightedSum, weighted_mean, weighted_sum
from xentjax._losses.sigmoid import (
    binary_cross_entropy,
    multilabel_cross_entropy,
    sigmoid_binary_cross_entropy,
)
from xentjax._losses.softmax import (
    SoftmaxStats,
    softmax_cross_entropy,
    softmax_cross_entropy_with_stats,
)
from xentjax._parallel.accumulation import accumulate_gradients
from xentjax._parallel.data import data_parallel, pmap_data_parallel
from xentjax._parallel.examples import per_example
from xentjax._parallel.vocab import (
    vocab_parallel_linear_softmax_cross_entropy,
    vocab_parallel_softmax_cross_entropy,
)
from xentjax._targets.mixing import cutmix, mixup
from xentjax._targets.transforms import dense_targets, mix_targets, reweight_targets, smooth_labels
from xentjax._targets.types import SparseTargets, Targets

__version__ = "0.1.0"

__all__ = [
    # What the truth looks like.
    "SparseTargets",
    "Targets",
    "smooth_labels",
    "mix_targets",
    "reweight_targets",
    "dense_targets",
    "mixup",
    "cutmix",
    # One class out of many.
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_stats",
    "SoftmaxStats",
    # The same from the layer before the logits.
    "linear_softmax_cross_entropy",
    "linear_softmax_cross_entropy_with_stats",
    "LinearStats",
    "soft_cap",
    "temperature",
    # Yes or no, once or for each label.
    "sigmoid_binary_cross_entropy",
    "multilabel_cross_entropy",
    "binary_cross_entropy",
    # Means that stay right.
    "weighted_mean",
    "weighted_sum",
    "WeightedSum",
    # One example, one device, many devices.
    "per_example",
    "accumulate_gradients",
    "data_parallel",
    "pmap_data_parallel",
    "vocab_parallel_softmax_cross_entropy",
    "vocab_parallel_linear_softmax_cross_entropy",
    # Information measures, of probabilities and of logits.
    "surprisal",
    "entropy",
    "cross_entropy",
    "kl_divergence",
    "js_divergence",
    "perplexity",
    "softmax_surprisal",
    "softmax_entropy",
    "softmax_kl_divergence",
    # Debugging.
    "label_checks",
]
