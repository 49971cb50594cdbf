"""`python -m xentjax lm`: a language model that learns the same with and without its logits.

One network learns to predict the next word of the Python standard library twice, side by side:
once with its logits [N, V] in memory and their loss by optax, and once with
`linear_softmax_cross_entropy`, which makes them block by block. It reads the last few words, as in
Bengio et al., A Neural Probabilistic Language Model, 2003, and the kernel of its logits is the
embedding of those words (Press and Wolf, Using the Output Embedding, 2017).
"""

import argparse
import collections
import dataclasses
import functools
import math
import re
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import xentjax
from xentjax._commands.common import (
    COLOURS,
    check_writable,
    columns_of,
    fail,
    progress_bar,
    result_lines,
    tidy,
)
from xentjax._explain.text import paragraph

CONTEXT = 8  # Words that are read to predict the next.
FEATURES = 128
HIDDEN = 256
LEARNING_RATE = 3e-3
TEST_SIZE = 2500  # Not a multiple of the batch: the last one is ragged.
TESTS = 10  # During the training; one more is before it.
# The largest relative difference of perplexities, or difference of losses in nats. At this rate
# rounding does not build up: it made up to 2.6e-6 in 2000 steps of a small model, and another order
# of the same batch 0.7e-6. At three times the rate that order alone made 2e-2.
TOLERANCE = 1e-4
TEST_SHARE = 10  # Every so many files are for the test.
# Tests and tables of character sets say little; the packages of pip differ between machines.
SKIPPED = {"test", "tests", "idlelib", "encodings", "site-packages", "dist-packages"}
WORD = re.compile(r"\w+|([^\w\s])\1*|\n")  # "---" and "\"\"\"" are a word each.
UNKNOWN = "<unk>"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text as indices into its vocabulary.

    Attributes:
      train: The words to learn from, int32[N].
      test: Those of other files, int32[M].
      counts: How often each word of the vocabulary is in `train`, int64[V]; class 0 is <unk>.
    """

    train: np.ndarray
    test: np.ndarray
    counts: np.ndarray


class Model(NamedTuple):
    """The parameters."""

    embedding: Float[Array, "V D"]
    bias: Float[Array, " V"]
    hidden: Float[Array, "CD H"]
    hidden_bias: Float[Array, " H"]
    out: Float[Array, "H D"]


Head = Callable[[jax.Array, Model, jax.Array], xentjax.WeightedSum]
Show = Callable[..., None]
"""Takes how many steps are done, and the perplexity after them where it was tested."""


@dataclasses.dataclass
class Course:
    """The training with one head, as far as it has come.

    Attributes:
      step: (model, optimizer's state, text, key) -> the next (model, state), compiled.
      state: (model, optimizer's state).
      test: (model, windows) -> a WeightedSum, compiled for each shape.
      temporaries: Bytes that a step needs beside its arguments and results.
      seconds: The time of each step.
      losses: On the test set by the steps done before it, in nats.
    """

    step: Callable
    state: tuple
    test: Callable
    temporaries: int
    seconds: list[float] = dataclasses.field(default_factory=list)
    losses: dict[int, float] = dataclasses.field(default_factory=dict)

    def perplexities(self) -> np.ndarray:
        """Returns exp(loss) for each test."""
        return np.exp(list(self.losses.values()))

    def median(self) -> float:
        """Returns the seconds of a step."""
        return float(np.median(self.seconds))


def full_logits(features: jax.Array, model: Model, labels: jax.Array) -> xentjax.WeightedSum:
    """Makes all logits, and leaves them to optax."""
    logits = features @ model.embedding.T + model.bias
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return xentjax.weighted_sum(losses)


def block_by_block(
    features: jax.Array, model: Model, labels: jax.Array, memory_budget: int
) -> xentjax.WeightedSum:
    """Never has all logits."""
    total = xentjax.linear_softmax_cross_entropy(
        features,
        model.embedding,
        labels,
        bias=model.bias,
        class_axis=0,
        reduction="sum",
        memory_budget=memory_budget,
    )
    return xentjax.WeightedSum(total, jnp.asarray(labels.size, total.dtype))


def run(arguments: argparse.Namespace) -> int:
    """Trains, tests, prints the table and saves the picture; returns the exit code."""
    check_writable("--output", arguments.output)
    start = time.perf_counter()
    folder = Path(sysconfig.get_path("stdlib"))
    corpus = read(folder, arguments.vocabulary)
    if min(len(corpus.train), len(corpus.test)) <= CONTEXT:
        return fail(f"{folder}: expected the sources of the standard library, got too few words")
    print("\n".join(introduction(corpus, arguments)))
    heads: dict[str, Head] = {
        "full logits (optax)": full_logits,
        "block by block (xentjax)": functools.partial(
            block_by_block, memory_budget=arguments.budget * 2**20
        ),
    }
    with progress_bar() as progress:
        bar = progress.add_task("compiling", total=arguments.steps)

        def show(done, perplexity=None):
            description = None if perplexity is None else f"perplexity {perplexity:.1f}"
            progress.update(bar, description=description, completed=done)

        courses = learn(heads, corpus, arguments, show)
    print("\n".join(report(courses, arguments.batch * len(corpus.counts))))
    try:
        picture(courses, len(corpus.counts)).savefig(arguments.output, dpi=150)
    except OSError as error:
        return fail(f"argument --output: {error}")
    print(f"Picture: {arguments.output}   ({time.perf_counter() - start:.0f} s in all)")
    difference, step = largest_difference(courses)
    if not difference <= TOLERANCE:
        return fail(
            f"after {step} steps the perplexities differ by {difference:.1e} of themselves: "
            f"expected at most {TOLERANCE:g}"
        )
    return 0


def read(folder: Path, vocabulary: int) -> Corpus:
    """Returns the text of the Python sources below `folder`; every tenth file is for the test."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    names = [name for name in names if not SKIPPED & set(name.split("/"))]
    train, test = [], []
    for i, name in enumerate(names):
        text = (folder / name).read_text("utf-8", errors="replace")
        words = (match.group() for match in WORD.finditer(text))
        (test if i % TEST_SHARE == TEST_SHARE - 1 else train).extend(words)
    known = [word for word, _ in collections.Counter(train).most_common(vocabulary - 1)]
    index = {word: i for i, word in enumerate([UNKNOWN, *known])}
    sides = [np.array([index.get(word, 0) for word in side], np.int32) for side in (train, test)]
    return Corpus(*sides, counts=np.bincount(sides[0], minlength=len(index)))


def introduction(corpus: Corpus, arguments: argparse.Namespace) -> list[str]:
    """Returns lines on the text and the task."""
    return paragraph(
        f"Python's standard library: {len(corpus.train):,} words to learn from and "
        f"{len(corpus.test):,} to test on, in a vocabulary of {len(corpus.counts):,} "
        f"(not in it: {np.mean(corpus.test == 0):.1%} of the test). "
        f"The last {CONTEXT} words tell the next, {arguments.batch:,} times a step."
    )


def init(key: jax.Array, counts: np.ndarray) -> Model:
    """Returns a model that knows how frequent each word is, and nothing else."""
    keys = jax.random.split(key, 3)
    frequency = (counts + 1) / np.sum(counts + 1)
    return Model(
        embedding=jax.random.normal(keys[0], (len(counts), FEATURES)) / math.sqrt(FEATURES),
        bias=jnp.log(jnp.asarray(frequency, jnp.float32)),
        hidden=jax.random.normal(keys[1], (CONTEXT * FEATURES, HIDDEN)) / math.sqrt(CONTEXT),
        hidden_bias=jnp.zeros(HIDDEN),
        out=jax.random.normal(keys[2], (HIDDEN, FEATURES)) * 0.1 / math.sqrt(HIDDEN),
    )


def network(model: Model, context: Int[Array, "N C"]) -> Float[Array, "N D"]:
    """Returns the features of the words that follow."""
    words = model.embedding[context].reshape(len(context), -1)
    return jax.nn.gelu(words @ model.hidden + model.hidden_bias) @ model.out


def loss_of(head: Head, model: Model, windows: Int[Array, "N C+1"]) -> xentjax.WeightedSum:
    """Returns the loss of the last word of each window, before the division."""
    return head(network(model, windows[:, :-1]), model, windows[:, -1])


def make_step(head: Head, optimizer: optax.GradientTransformation, batch: int) -> Callable:
    """Returns the step that learns from `batch` windows of the text, chosen by the key."""

    def step(model, state, text, key):
        first = jax.random.randint(key, (batch, 1), 0, len(text) - CONTEXT)
        windows = text[first + jnp.arange(CONTEXT + 1)]
        gradient = jax.grad(lambda model: loss_of(head, model, windows).mean())(model)
        updates, state = optimizer.update(gradient, state, model)
        return optax.apply_updates(model, updates), state

    return step


def begin(head: Head, corpus: Corpus, arguments: argparse.Namespace, key: jax.Array) -> Course:
    """Compiles the step with one head; from one key every head has the same model."""
    model = init(key, corpus.counts)
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, arguments.steps))
    state = (model, optimizer.init(model))
    step = jax.jit(make_step(head, optimizer, arguments.batch), donate_argnums=(0, 1))
    compiled = step.lower(*state, corpus.train, key).compile()
    memory = compiled.memory_analysis()
    if memory is None:
        raise NotImplementedError(f"{jax.default_backend()} does not tell what memory it needs")
    test = jax.jit(functools.partial(loss_of, head))
    return Course(compiled, state, test, memory.temp_size_in_bytes)


def learn(
    heads: dict[str, Head], corpus: Corpus, arguments: argparse.Namespace, show: Show
) -> dict[str, Course]:
    """Trains with every head on the same batches, taking turns; calls `show` after each step."""
    init_key, order_key = jax.random.split(jax.random.key(arguments.seed))
    courses = {name: begin(head, corpus, arguments, init_key) for name, head in heads.items()}
    text = jnp.asarray(corpus.train)
    every = math.ceil(arguments.steps / TESTS)
    for i, key in enumerate(jax.random.split(order_key, arguments.steps)):
        if i % every == 0:
            test(courses, corpus, arguments.batch, i, show)
        turns = list(courses.values())
        for course in turns if i % 2 else reversed(turns):
            start = time.perf_counter()
            course.state = jax.block_until_ready(course.step(*course.state, text, key))
            course.seconds.append(time.perf_counter() - start)
        show(i + 1)
    test(courses, corpus, arguments.batch, arguments.steps, show)
    return courses


def test(courses: dict[str, Course], corpus: Corpus, batch: int, steps: int, show: Show) -> None:
    """Adds each model's loss on windows spread evenly over the test text."""
    count = min(TEST_SIZE, len(corpus.test) - CONTEXT)
    first = np.linspace(0, len(corpus.test) - CONTEXT - 1, count).astype(int)
    windows = corpus.test[first[:, None] + np.arange(CONTEXT + 1)]
    for course in courses.values():
        loss = xentjax.WeightedSum.zero()
        for start in range(0, count, batch):
            loss += course.test(course.state[0], windows[start : start + batch])
        course.losses[steps] = float(loss.mean())
        show(steps, math.exp(course.losses[steps]))


def largest_difference(courses: dict[str, Course]) -> tuple[float, int]:
    """Returns the largest relative difference of perplexities, and after how many steps it was."""
    theirs, ours = (course.perplexities() for course in courses.values())
    differences = np.abs(ours - theirs) / theirs
    steps = list(next(iter(courses.values())).losses)
    return float(differences.max()), steps[int(differences.argmax())]


def report(courses: dict[str, Course], num_logits: int) -> list[str]:
    """Returns the table, and the meanings of its words, as lines."""
    difference, step = largest_difference(courses)
    logits = f"the logits alone are {4 * num_logits / 2**20:.1f} MiB"
    words = [
        ("time per step", "median of all steps, one with each loss in turn"),
        (
            "temporaries",
            f"memory of a compiled step beside the model, Adam's state and the text; {logits}",
        ),
        (
            "perplexity",
            "exp of the mean surprisal of the next word, on the test set; before, only the "
            "frequency of each word is known",
        ),
    ]
    end = f"The perplexities differ by at most {difference:.1e} of themselves, after {step} steps."
    return result_lines(columns(courses), words, end)


def columns(courses: dict[str, Course]) -> list[list[str]]:
    """Returns the table, column by column: the heading, then a cell for each loss."""
    found = {
        "time per\nstep, ms": lambda x: f"{1000 * x.median():.0f}",
        "temporaries,\nMiB": lambda x: f"{x.temporaries / 2**20:.1f}",
        "perplexity\nbefore": lambda x: f"{x.perplexities()[0]:.3f}",
        "after": lambda x: f"{x.perplexities()[-1]:.3f}",
    }
    return columns_of("loss", courses, found)


def picture(courses: dict[str, Course], num_classes: int) -> Figure:
    """Returns perplexity by steps beside memory and time."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axes = figure.subplot_mosaic(
        [["perplexity", "memory"], ["perplexity", "time"]], width_ratios=[1.3, 1]
    )
    title = f"A language model of {num_classes:,} words, with and without its logits"
    figure.suptitle(title, weight="bold")
    draw_perplexities(axes["perplexity"], courses)
    memory = [course.temporaries / 2**20 for course in courses.values()]
    draw_bars(axes["memory"], list(courses), memory, "Temporaries of a training step (MiB)")
    times = [1000 * course.median() for course in courses.values()]
    draw_bars(axes["time"], list(courses), times, "Time of a training step (ms, median)")
    for ax in axes.values():
        tidy(ax)
    return figure


def draw_perplexities(ax: Axes, courses: dict[str, Course]) -> None:
    """Draws a wide line with each other one dotted on it: they should be one."""
    for i, ((name, course), colour) in enumerate(zip(courses.items(), COLOURS, strict=False)):
        style = {"lw": 2, "ls": ":", "marker": "."} if i else {"lw": 6, "alpha": 0.4}
        ax.plot(list(course.losses), course.perplexities(), color=colour, label=name, **style)
    ax.set(title="Perplexity of the test set", xlabel="steps")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="upper right", fontsize="small")


def draw_bars(ax: Axes, names: list[str], values: list[float], title: str) -> None:
    """Draws one bar for each name, with its value beside it."""
    bars = ax.barh(
        [name.replace(" (", "\n(") for name in names], values, color=COLOURS[: len(names)]
    )
    ax.bar_label(bars, fmt="%.0f", padding=3)
    ax.set(title=title, xlim=(0, 1.15 * max(values)))
    ax.invert_yaxis()
