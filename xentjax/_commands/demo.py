"""`python -m xentjax demo`: how targets change the accuracy and the confidence of a classifier.

One network learns scikit-learn's handwritten digits three times: from hard labels, from smoothed
labels and under mixup. It learns from the first half and is tested on the second; the order of the
data seems to keep each writer's digits together, so the test is mostly in hands not seen before.
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.datasets import load_digits

import xentjax
from xentjax._commands.common import (
    check_writable,
    columns_of,
    fail,
    progress_bar,
    result_lines,
)
from xentjax._explain.text import paragraph
from xentjax.plot import STYLE, reliability

TRAIN_SIZE = 900
BATCH_SIZE = 50
TEST_BATCH_SIZE = 256  # Does not divide the 897 test examples: the last batch is ragged.
LAYERS = (64, 256, 10)
LEARNING_RATE = 0.01
SMOOTHING = 0.1
MIXUP_ALPHA = 0.4
NUM_BINS = 10
FEWEST_SHOWN = 5  # An accuracy of fewer predictions is mostly chance: such bins are not drawn.
TOLERANCE = 1e-6  # The largest relative difference from optax.

Params = list[tuple[jax.Array, jax.Array]]
Set = tuple[Float[Array, "n 64"], Int[Array, " n"]]
Recipe = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, xentjax.Targets]]


def hard_labels(key, images, labels):
    """Learns from the labels as they are."""
    del key
    return images, labels


def smoothed_labels(key, images, labels):
    """Spreads a share of the truth over all classes."""
    del key
    return images, xentjax.smooth_labels(labels, SMOOTHING)


def mixup(key, images, labels):
    """Blends pairs of images, and their labels alike."""
    return xentjax.mixup(key, images, labels, MIXUP_ALPHA, per_example=True)


RECIPES = {"hard": hard_labels, "smoothed": smoothed_labels, "mixup": mixup}


@dataclasses.dataclass(frozen=True)
class Epoch:
    """Losses and accuracy after one pass over the examples; losses are means, in nats.

    Attributes:
      train_loss: On the targets that were learnt from.
      loss: On the test set and its hard labels.
      accuracy: On the test set.
      logits: Those of the test set, float32[N, 10].
    """

    train_loss: float
    loss: float
    accuracy: float
    logits: np.ndarray


@dataclasses.dataclass(frozen=True)
class Result:
    """A row of the table, and the reliability diagram behind it.

    Attributes:
      accuracy: The share of the test set that is predicted right.
      confidence: The mean probability of the predicted class.
      calibration_error: Σ_b share_b · |accuracy_b − confidence_b| over bins b of confidence
        (Guo et al., On Calibration of Modern Neural Networks, 2017, section 2).
      loss: Mean cross-entropy of the hard labels, in nats.
      optax_loss: The same by optax, from the same logits.
      bins: The reliability diagram of the test set.
    """

    accuracy: float
    confidence: float
    calibration_error: float
    loss: float
    optax_loss: float
    bins: xentjax.ReliabilityBins

    def optax_difference(self) -> float:
        """Returns the relative difference from optax's loss."""
        return abs(self.loss - self.optax_loss) / self.optax_loss


def run(arguments: argparse.Namespace) -> int:
    """Trains, tests, prints the table and saves the picture; returns the exit code."""
    check_writable("--output", arguments.output)
    start = time.perf_counter()
    train, test = load()
    title = f"Handwritten digits: {len(train[1])} to learn from, {len(test[1])} to test on."
    print("\n".join(paragraph(title)))
    courses = {}
    with progress_bar() as progress:
        bar = progress.add_task("", total=len(RECIPES) * arguments.epochs)
        for name, recipe in RECIPES.items():
            progress.update(bar, description=name)
            courses[name] = []
            for epoch in learn(recipe, train, test, arguments.epochs, arguments.seed):
                courses[name].append(epoch)
                progress.advance(bar)
    results = {name: measure(course[-1], np.asarray(test[1])) for name, course in courses.items()}
    print("\n".join(report(results)))
    try:
        picture(courses, results).savefig(arguments.output, dpi=150)
    except OSError as error:
        return fail(f"argument --output: {error}")
    print(f"Picture: {arguments.output}   ({time.perf_counter() - start:.0f} s in all)")
    for name, result in results.items():
        if not result.optax_difference() <= TOLERANCE:
            return fail(
                f"{name}: the loss is {result.loss!r}, and {result.optax_loss!r} by optax: "
                f"expected a relative difference of at most {TOLERANCE:g}"
            )
    return 0


def load() -> tuple[Set, Set]:
    """Returns the examples to learn from and those to be tested on; pixels are in [0, 1]."""
    pixels, digits = load_digits(return_X_y=True)
    images, labels = jnp.asarray(pixels / 16, jnp.float32), jnp.asarray(digits, jnp.int32)
    return (images[:TRAIN_SIZE], labels[:TRAIN_SIZE]), (images[TRAIN_SIZE:], labels[TRAIN_SIZE:])


@jax.jit
def init(key: jax.Array) -> Params:
    """Returns a kernel and a bias for each layer."""
    keys = jax.random.split(key, len(LAYERS) - 1)
    return [
        (jax.random.normal(k, (n, m)) * math.sqrt(2 / n), jnp.zeros(m))
        for k, n, m in zip(keys, LAYERS[:-1], LAYERS[1:], strict=True)
    ]


def network(params: Params, x: jax.Array) -> jax.Array:
    """Returns the logits of images."""
    *hidden, (kernel, bias) = params
    for w, b in hidden:
        x = jax.nn.relu(x @ w + b)
    return x @ kernel + bias


def make_train_step(recipe: Recipe, optimizer: optax.GradientTransformation) -> Callable:
    """Returns the step that learns from one batch, compiled as one."""

    @jax.jit
    def train_step(params, state, key, images, labels):
        inputs, targets = recipe(key, images, labels)

        def objective(params):
            losses = xentjax.softmax_cross_entropy(network(params, inputs), targets)
            return xentjax.weighted_mean(losses)

        loss, gradient = jax.value_and_grad(objective)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    return train_step


@jax.jit
def eval_step(params, images, labels):
    """Returns the loss and the accuracy of one batch, before their division, and its logits."""
    logits = network(params, images)
    losses, stats = xentjax.softmax_cross_entropy_with_stats(logits, labels)
    correct = stats.correct.astype(jnp.float32)
    return xentjax.weighted_sum(losses), xentjax.weighted_sum(correct), logits


def evaluate(params: Params, test: Set) -> tuple[float, float, np.ndarray]:
    """Returns loss, accuracy and logits on `test`, one batch at a time."""
    images, labels = test
    loss, accuracy = xentjax.WeightedSum.zero(), xentjax.WeightedSum.zero()
    logits = []
    for start in range(0, len(labels), TEST_BATCH_SIZE):
        batch = slice(start, start + TEST_BATCH_SIZE)
        batch_loss, batch_accuracy, batch_logits = eval_step(params, images[batch], labels[batch])
        loss, accuracy = loss + batch_loss, accuracy + batch_accuracy
        logits.append(batch_logits)
    return float(loss.mean()), float(accuracy.mean()), np.concatenate(logits)


def learn(recipe: Recipe, train: Set, test: Set, epochs: int, seed: int) -> Iterator[Epoch]:
    """Trains, epoch by epoch; from one seed every recipe has the same start and order."""
    images, labels = train
    steps = len(labels) // BATCH_SIZE
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, epochs * steps))
    train_step = make_train_step(recipe, optimizer)
    key, init_key = jax.random.split(jax.random.key(seed))
    params = init(init_key)
    state = optimizer.init(params)
    for epoch_key in jax.random.split(key, epochs):
        order_key, *step_keys = jax.random.split(epoch_key, steps + 1)
        order = jax.random.permutation(order_key, len(labels))[: steps * BATCH_SIZE]
        losses = []
        for batch, step_key in zip(order.reshape(steps, BATCH_SIZE), step_keys, strict=True):
            params, state, loss = train_step(params, state, step_key, images[batch], labels[batch])
            losses.append(loss)
        yield Epoch(float(np.mean(losses)), *evaluate(params, test))


def measure(epoch: Epoch, labels: np.ndarray) -> Result:
    """Sorts the predictions into bins of equal width by confidence; asks optax for its loss."""
    bins = xentjax.reliability_bins(epoch.logits, labels, num_bins=NUM_BINS)
    optax_losses = optax.softmax_cross_entropy_with_integer_labels(epoch.logits, labels)
    return Result(
        accuracy=epoch.accuracy,
        confidence=float(bins.confidence.sum() / bins.count.sum()),
        calibration_error=float(bins.expected_calibration_error()),
        loss=epoch.loss,
        optax_loss=float(np.asarray(optax_losses, np.float64).mean()),
        bins=bins,
    )


def report(results: dict[str, Result]) -> list[str]:
    """Returns the table, and the meanings of its words, as lines."""
    difference = max(result.optax_difference() for result in results.values())
    words = [
        ("confidence", "mean probability of the predicted class"),
        ("ECE", f"expected calibration error: |accuracy − confidence| over {NUM_BINS} bins"),
        ("loss", "mean surprisal of the true labels, whatever the network learnt from"),
        ("by optax", f"from the same logits; the relative difference is at most {difference:.1e}"),
    ]
    best = (
        f"Most accurate: {max(results, key=lambda name: results[name].accuracy)}."
        f" Lowest loss: {min(results, key=lambda name: results[name].loss)}."
        f" Best calibrated: {min(results, key=lambda name: results[name].calibration_error)}."
    )
    return result_lines(columns(results), words, best)


def columns(results: dict[str, Result]) -> list[list[str]]:
    """Returns the table, column by column: the heading, then a cell for each kind of targets."""
    found = {
        "accuracy": lambda x: f"{x.accuracy:.1%}",
        "confidence": lambda x: f"{x.confidence:.1%}",
        "ECE": lambda x: f"{x.calibration_error:.1%}",
        "loss,\nnats": lambda x: f"{x.loss:.6f}",
        "by optax,\nnats": lambda x: f"{x.optax_loss:.6f}",
        "loss,\nbits": lambda x: f"{x.loss / math.log(2):.4f}",
        "perplexity": lambda x: f"{float(xentjax.perplexity(x.loss)):.4f}",
    }
    return columns_of("targets", results, found)


def picture(courses: dict[str, list[Epoch]], results: dict[str, Result]) -> Figure:
    """Returns the loss by epoch beside the reliability diagram."""
    with style.context(STYLE):
        figure = Figure(figsize=(11, 5.5))
        axes = figure.subplot_mosaic(
            [["loss", "reliability"], ["loss", "shares"]],
            height_ratios=[3, 1],
            width_ratios=[1.1, 1],
        )
        figure.suptitle("Handwritten digits: one network, three kinds of targets", weight="bold")
        draw_losses(axes["loss"], courses)
        for name, result in results.items():
            label = f"{name}: ECE {result.calibration_error:.1%}"
            reliability(result.bins, label=label, fewest=FEWEST_SHOWN, ax=axes["reliability"])
        draw_shares(axes["shares"], results)
    return figure


def draw_losses(ax: Axes, courses: dict[str, list[Epoch]]) -> None:
    """Draws the loss on the test set, and on the targets of the training."""
    for i, (name, course) in enumerate(courses.items()):
        colour = to_hex(f"C{i}")
        epochs = range(1, len(course) + 1)
        losses = [epoch.loss for epoch in course]
        ax.plot(epochs, losses, color=colour, marker=".", label=f"{name}: test")
        losses = [epoch.train_loss for epoch in course]
        label = f"{name}: training, on its own targets"
        ax.plot(epochs, losses, color=colour, ls="--", lw=1, marker=",", label=label)
    top = 2.2 * max(epoch.loss for course in courses.values() for epoch in course)
    ax.set(title="Loss", xlabel="epoch", ylabel="mean cross-entropy (nats)", ylim=(0, top))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="upper right", fontsize="small", framealpha=0.9)


def draw_shares(ax: Axes, results: dict[str, Result]) -> None:
    """Draws how many of the predictions each bin of confidence holds."""
    width = 100 / NUM_BINS / (len(results) + 1)
    left = np.linspace(0, 100, NUM_BINS, endpoint=False) + width
    for i, result in enumerate(results.values()):
        counts = np.asarray(result.bins.count)
        shares = 100 * counts / counts.sum()
        ax.bar(left + i * width, shares, width, color=to_hex(f"C{i}"))
    ax.set(xlabel="confidence: probability of the predicted class (%)", xlim=(0, 100))
    ax.set(ylabel="predictions (%)", ylim=(0, 100))
