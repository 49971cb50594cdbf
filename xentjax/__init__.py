"""Cross-entropy and its family for JAX: exact, small in memory, right on every device.

Targets: the forms that the truth has.
  SparseTargets: mass on K classes for each example, and the rest spread over a background
  LinearTargets: the softmax of a teacher's head, whose logits are never all in memory
  Targets: the type of labels, dense masses and SparseTargets
  smooth_labels: label smoothing
  mix_targets: a share of one target, and the rest of another
  reweight_targets: class weights
  dense_targets: one mass for each class, written out
  mixup: mixes examples of a batch, inputs and targets alike
  cutmix: pastes boxes of other images, and mixes targets by area
  top_k_targets: a teacher's largest probabilities, from its logits
  teacher_targets: the same as they were stored

Losses of logits, one class out of many.
  softmax_cross_entropy: one loss for each example
  softmax_cross_entropy_with_stats: the same, with a SoftmaxStats
  SoftmaxStats: log-normalizer, prediction, correctness, entropy, the label's log-probability

Losses of the layer before the logits, for large vocabularies.
  linear_softmax_cross_entropy: the loss without the logits in memory
  linear_softmax_cross_entropy_with_stats: the same, with a SoftmaxStats
  soft_cap: a logit transform that bounds logits
  temperature: a logit transform that divides them

Losses of yes or no.
  sigmoid_binary_cross_entropy: of logits, element by element
  multilabel_cross_entropy: of logits, summed over the labels of an example
  asymmetric_cross_entropy: of logits, with an easy no that counts less, or nothing
  binary_cross_entropy: of probabilities, element by element
  smooth_binary_labels: label smoothing of yes and no

Shapes of a loss of hard labels.
  focal: less where the label is probable already
  poly1: counts 1 − p more, or less
  generalized: robust to wrong labels

Class weights.
  class_balanced_weights: from how many examples each class has

Calibration.
  fit_temperature: the temperature that makes logits fit best
  expected_calibration_error: how far confidence is from accuracy
  reliability_bins: the data of a reliability diagram
  ReliabilityBins: those, as sums that add
  brier_score: the squared error of the probabilities

Curvature.
  softmax_hessian_product: the Hessian of the softmax cross-entropy in the logits, times a vector

Some classes, and all others as one outcome.
  bucket_logits: from logits
  linear_bucket_logits: from the layer before the logits

Contrast: the pairs of a batch, without all similarities in memory.
  info_nce: each query against all keys, and CLIP's loss
  nt_xent: embeddings of one label against those of others, as in SimCLR
  supervised_contrastive: the same with all partners as the target

Margins: the loss when the label's logit is lower.
  additive_margin: by a number, as in CosFace
  angular_margin: to its cosine at a larger angle, as in ArcFace

Means that stay right over masks, weights, microbatches and devices.
  weighted_mean: the mean of losses
  weighted_sum: the two sums it is made of
  WeightedSum: a total and a weight, which add

One example, one device, many devices.
  per_example: losses and gradients of each example
  accumulate_gradients: the mean and its gradient in microbatches, on one device
  data_parallel: the same with the examples split over a mesh
  pmap_data_parallel: the same for stacked arrays, as of jax.pmap
  vocab_parallel_softmax_cross_entropy: the loss with the classes split over devices
  vocab_parallel_softmax_cross_entropy_with_stats: the same, with a SoftmaxStats
  vocab_parallel_linear_softmax_cross_entropy: the same of the layer before the logits
  vocab_parallel_linear_softmax_cross_entropy_with_stats: the same, with a SoftmaxStats

Information, of probabilities and of logits.
  surprisal: of an outcome
  entropy: of a distribution
  cross_entropy: of a prediction, under a truth
  kl_divergence: of a prediction above the entropy of the truth
  js_divergence: of two distributions from their middle
  perplexity: the number of equally likely outcomes, from a mean loss
  softmax_surprisal: of every class, from logits
  softmax_entropy: of softmax(logits)
  softmax_kl_divergence: of two softmaxes, from logits
  softmax_js_divergence: of two softmaxes from their middle, from logits
  target_entropy: of targets of any form
  target_kl_divergence: of softmax(logits) from targets of any form

Explaining.
  explain: every link from a prediction to its loss, as text, table and picture
  Explanation: those links as arrays

Debugging.
  value_checks: makes values that have no meaning an error: labels, masses, NaN logits
"""

import xentjax._process  # Before JAX: see there.  # noqa: F401
from xentjax._explain.explanation import Explanation, explain
from xentjax._jax.value_checks import value_checks
from xentjax._losses.buckets import bucket_logits, linear_bucket_logits
from xentjax._losses.calibration import (
    ReliabilityBins,
    brier_score,
    expected_calibration_error,
    fit_temperature,
    reliability_bins,
)
from xentjax._losses.contrast import info_nce, nt_xent, supervised_contrastive
from xentjax._losses.curvature import softmax_hessian_product
from xentjax._losses.information import (
    cross_entropy,
    entropy,
    js_divergence,
    kl_divergence,
    perplexity,
    surprisal,
)
from xentjax._losses.linear import (
    linear_softmax_cross_entropy,
    linear_softmax_cross_entropy_with_stats,
)
from xentjax._losses.logit_transform import soft_cap, temperature
from xentjax._losses.margins import additive_margin, angular_margin
from xentjax._losses.reduction import WeightedSum, weighted_mean, weighted_sum
from xentjax._losses.shapes import focal, generalized, poly1
from xentjax._losses.sigmoid import (
    asymmetric_cross_entropy,
    binary_cross_entropy,
    multilabel_cross_entropy,
    sigmoid_binary_cross_entropy,
)
from xentjax._losses.softmax import softmax_cross_entropy, softmax_cross_entropy_with_stats
from xentjax._losses.softmax_information import (
    softmax_entropy,
    softmax_js_divergence,
    softmax_kl_divergence,
    softmax_surprisal,
)
from xentjax._losses.stats import SoftmaxStats
from xentjax._losses.target_information import target_entropy, target_kl_divergence
from xentjax._parallel.accumulation import accumulate_gradients
from xentjax._parallel.data import data_parallel, pmap_data_parallel
from xentjax._parallel.examples import per_example
from xentjax._parallel.vocab import (
    vocab_parallel_linear_softmax_cross_entropy,
    vocab_parallel_linear_softmax_cross_entropy_with_stats,
    vocab_parallel_softmax_cross_entropy,
    vocab_parallel_softmax_cross_entropy_with_stats,
)
from xentjax._targets.balance import class_balanced_weights
from xentjax._targets.binary import smooth_binary_labels
from xentjax._targets.linear import LinearTargets
from xentjax._targets.mixing import cutmix, mixup
from xentjax._targets.top_k import teacher_targets, top_k_targets
from xentjax._targets.transforms import dense_targets, mix_targets, reweight_targets, smooth_labels
from xentjax._targets.types import SparseTargets, Targets

__version__ = "0.1.0"

__all__ = [
    # The forms that the truth has.
    "SparseTargets",
    "LinearTargets",
    "Targets",
    "smooth_labels",
    "mix_targets",
    "reweight_targets",
    "dense_targets",
    "mixup",
    "cutmix",
    "top_k_targets",
    "teacher_targets",
    # One class out of many.
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_stats",
    "SoftmaxStats",
    # The same from the layer before the logits.
    "linear_softmax_cross_entropy",
    "linear_softmax_cross_entropy_with_stats",
    "soft_cap",
    "temperature",
    # Yes or no, once or for each label.
    "sigmoid_binary_cross_entropy",
    "multilabel_cross_entropy",
    "asymmetric_cross_entropy",
    "binary_cross_entropy",
    "smooth_binary_labels",
    # Shapes of a loss, and class weights.
    "focal",
    "poly1",
    "generalized",
    "class_balanced_weights",
    # Calibration, and curvature.
    "fit_temperature",
    "expected_calibration_error",
    "reliability_bins",
    "ReliabilityBins",
    "brier_score",
    "softmax_hessian_product",
    # Some classes, and all others as one outcome.
    "bucket_logits",
    "linear_bucket_logits",
    # Contrast.
    "info_nce",
    "nt_xent",
    "supervised_contrastive",
    # Margins.
    "additive_margin",
    "angular_margin",
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
    "vocab_parallel_softmax_cross_entropy_with_stats",
    "vocab_parallel_linear_softmax_cross_entropy",
    "vocab_parallel_linear_softmax_cross_entropy_with_stats",
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
    "softmax_js_divergence",
    "target_entropy",
    "target_kl_divergence",
    # Explaining.
    "explain",
    "Explanation",
    # Debugging.
    "value_checks",
]
