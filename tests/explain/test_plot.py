"""`xentjax.plot`: the data that each picture draws, its units, its axes and styles, no overlap."""

import inspect
import itertools
import math
import re

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")

import matplotlib.pyplot as plt

import xentjax as xj
import xentjax.plot as xp

ANIMALS = ["panda", "bird", "dog"]
TRUTH, GUESS = np.array([0.2, 0.3, 0.5], np.float32), np.array([0.1, 0.2, 0.7], np.float32)


def quadratic(w):
    return w[0] ** 2 + 3 * w[1] ** 2


CALLS = {
    "surprisal_curve": ({"panda": 0.001, "coin": 0.5, "certain": 1.0},),
    "cross_entropy_areas": (TRUTH, GUESS),
    "log_loss": (),
    "log_loss_beside_difference": (),
    "margin": (),
    "simplex": (xj.smooth_labels(2, 0.1),),
    "loss_surface": (quadratic, jnp.zeros(2), (jnp.eye(2)[0], jnp.eye(2)[1])),
    "steps_to_target": (GUESS, np.eye(3)[2]),
    "target_bars": ({"label": 1, "smoothed": xj.smooth_labels(1, 0.1)}, 4),
    "reliability": (xj.ReliabilityBins(*np.array([[10, 0, 30], [5.5, 0, 28.5], [5, 0, 27]])),),
}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_every_function_is_here():
    assert set(CALLS) == set(xp.__all__) - {"STYLE"}
    assert sorted(re.findall(r"^  (\w+): ", xp.__doc__, re.MULTILINE)) == sorted(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_draws_into_the_given_axes_and_without_overlap(name):
    with plt.rc_context(xp.STYLE):
        figure, ax = plt.subplots()
        assert getattr(xp, name)(*CALLS[name], ax=ax) is ax
        assert plt.gcf() is figure
        assert ax.get_title()
        labels = " ".join([a.get_ylabel() + a.get_xlabel() + a.get_title() for a in figure.axes])
        assert re.search(r"nats?\b|bits|%|shares? of 1|\|p − 1\|", labels), labels
        figure.draw_without_rendering()
        texts = [t for a in figure.axes for t in (*a.texts, a.title) if t.get_text().strip()]
        boxes = [text.get_window_extent() for text in texts]
        legend = ax.get_legend()
        boxes += [legend.get_window_extent()] if legend else []
        for a, b in itertools.combinations(boxes, 2):
            assert not a.overlaps(b), [t.get_text() for t in texts]
        size = figure.bbox
        for box in boxes:
            assert size.x0 - 1 <= box.x0 <= box.x1 <= size.x1 + 1
            assert size.y0 - 1 <= box.y0 <= box.y1 <= size.y1 + 1


@pytest.mark.parametrize("name", ["log_loss", "target_bars"])
def test_without_axes_pyplot_has_them_and_the_style_is_the_users(name):
    cycle = mpl.cycler(color=["#123456", "#654321"])
    with plt.rc_context({"axes.prop_cycle": cycle}):
        ax = getattr(xp, name)(*CALLS[name])
    assert plt.gca() is ax
    drawn = [line.get_color() for line in ax.lines] + [p.get_facecolor() for p in ax.patches]
    assert {mpl.colors.to_hex(c) for c in drawn} >= {"#123456", "#654321"}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_axes_are_named(name):
    with pytest.raises(TypeError, match=r"ax: expected matplotlib Axes, got 'x'"):
        getattr(xp, name)(*CALLS[name], ax="x")


def curve(ax, i=0):
    return (np.asarray(x, np.float64) for x in ax.lines[i].get_data())


@pytest.mark.parametrize(("base", "nats"), [(None, 1), (2, math.log(2))])
def test_surprisal_and_log_loss(base, nats):
    p, s = curve(xp.surprisal_curve(base=base))
    np.testing.assert_allclose(s, -np.log(p) / nats, rtol=1e-6, atol=1e-7)
    ax = xp.log_loss(base=base, ax=plt.figure().subplots())
    for i, loss in enumerate([lambda p: -np.log(p), lambda p: -np.log1p(-p)]):
        p, y = curve(ax, i)
        np.testing.assert_allclose(y, loss(p) / nats, rtol=1e-6)


def test_areas_are_the_cross_entropy():
    for prediction, name in [(None, "entropy"), (GUESS, "cross-entropy")]:
        ax = xp.cross_entropy_areas(TRUTH, prediction, ax=plt.figure().subplots())
        areas = [bar.get_width() * bar.get_height() for bar in ax.patches]
        q = TRUTH if prediction is None else prediction
        want = -np.sum(TRUTH.astype(float) * np.log(q.astype(float)))
        np.testing.assert_allclose(sum(areas), want, rtol=1e-6)
        assert ax.get_title() == f"{name} = area = {want:.4f} nats"


def test_slopes_are_the_derivatives():
    costs, slopes = (
        xp.log_loss_beside_difference(slopes=s, ax=plt.figure().subplots()) for s in (False, True)
    )
    p, y = curve(costs, 1)
    np.testing.assert_allclose(y, 1 - p, atol=1e-7)
    for i, slope in enumerate([lambda p: p - 1, lambda p: -p * (1 - p)]):
        z, y = curve(slopes, i)
        np.testing.assert_allclose(y, slope(1 / (1 + np.exp(-z))), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("quantity", ["loss", "gradient"])
def test_margin_is_exact_and_shades_where_the_naive_formula_is_zero(quantity):
    ax = xp.margin(quantity)
    margin, y = curve(ax)
    want = np.log1p(np.exp(-margin)) if quantity == "loss" else 1 / (1 + np.exp(margin))
    np.testing.assert_allclose(y, want, rtol=3e-6)
    naive = np.asarray(ax.lines[1].get_ydata())
    first = margin[np.isnan(naive)].min()
    assert ax.patches[0].get_x() == first
    assert 13 < first < 18


def test_simplex_arrows_lead_to_the_target():
    ax = xp.simplex(np.array([0.2, 0.3, 0.5]))
    (arrows,) = [c for c in ax.collections if type(c).__name__ == "Quiver"]
    corners = np.array([[0, 0], [1, 0], [0.5, math.sqrt(3) / 2]])
    to_target = np.array([0.2, 0.3, 0.5]) @ corners - arrows.XY
    far = np.linalg.norm(to_target, axis=-1) > 0.1
    cosines = (arrows.U * to_target[:, 0] + arrows.V * to_target[:, 1])[far]
    assert far.sum() > 10
    assert np.all(cosines > 0)


def test_surface_is_the_loss():
    ax = xp.loss_surface(quadratic, jnp.zeros(2), tuple(jnp.eye(2)), radius=2.0, steps=5)
    levels = ax.collections[0].levels
    assert levels[0] <= 0
    assert levels[-1] >= 16
    lows = [path.vertices for path in ax.collections[0].get_paths() if len(path.vertices)]
    x, y = np.abs(lows[0]).max(0)  # The lowest contour is longer along the flat direction.
    assert x > y


def test_explanation_has_the_numbers_of_the_example():
    e = xj.explain(np.log(np.stack([GUESS, TRUTH])), [2, 0], base=2, classes=ANIMALS)
    ax = e[0].plot()
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches], GUESS, rtol=1e-6)
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [0, 0, 1])
    assert ax.get_title() == "loss = 0.5146 bits"
    with pytest.raises(
        ValueError, match=r"prediction: expected shape \[V\], one example, got \(2, 3\)"
    ):
        e.plot()


def test_target_bars_are_the_dense_targets():
    ax = xp.target_bars({"a": xj.smooth_labels(1, 0.1), "b": xj.mix_targets(0, 2, 0.7)}, 3)
    heights = np.reshape([bar.get_height() for bar in ax.patches], (2, 3))
    np.testing.assert_allclose(
        heights, [[0.1 / 3, 0.9 + 0.1 / 3, 0.1 / 3], [0.7, 0, 0.3]], atol=1e-7
    )


def test_reliability_of_two_models():
    counts, confidence, accuracy = np.array([[4, 5, 6], [0.6, 0.7, 0.9], [0.9, 0.8, 1.0]])
    two = xj.ReliabilityBins(counts, counts * confidence, counts * accuracy)
    ax = xp.reliability(*CALLS["reliability"], label="one")
    xp.reliability(two, label="two", fewest=5, ax=ax)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["calibrated", "one", "two"]
    np.testing.assert_allclose(ax.lines[1].get_data(), [[55, 95], [50, 90]])
    np.testing.assert_allclose(ax.lines[2].get_data(), [[70, 90], [80, 100]])
    assert ax.lines[1].get_color() != ax.lines[2].get_color()


@pytest.mark.parametrize("name", CALLS)
def test_docstrings_have_every_section(name):
    function = getattr(xp, name)
    doc = inspect.getdoc(function)
    for heading in ("Args:", "Returns:", "Raises:", "Example:"):
        assert f"\n{heading}\n" in doc
    described = re.findall(
        r"^  (\w+): ", doc.split("Args:\n")[1].split("Returns:")[0], re.MULTILINE
    )
    assert described == list(inspect.signature(function).parameters)
