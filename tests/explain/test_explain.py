"""`explain`: every number against float64 NumPy, in every form, as text and as HTML."""

import math
import re
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xentjax as xj

LN2 = math.log(2)
Z = np.array([[2.0, -1.0, 0.5, 0.0], [20.0, 5.0, -3.0, 1.0]])
DENSE = np.array([[0.1, 0.2, 0.3, 0.4], [1.0, 0.0, 0.0, 0.0]])
LABELS = np.array([3, 0])
PRIOR = np.array([0.4, 0.3, 0.2, 0.1], np.float32)
SMOOTHED = 0.9 * np.eye(4)[LABELS] + 0.1 * PRIOR
COSTS = np.array([1.0, 5.0, 2.0, 0.5], np.float32)

FORMS = {
    "labels": (LABELS, np.eye(4)[LABELS]),
    "dense": (DENSE, DENSE),
    "a prior": (xj.smooth_labels(LABELS, 0.1, background=PRIOR), SMOOTHED),
    "weighted classes": (
        xj.reweight_targets(xj.smooth_labels(LABELS, 0.1, background=PRIOR), COSTS),
        SMOOTHED * COSTS,
    ),
    "no mass": (np.zeros((2, 4)), np.zeros((2, 4))),
}


def plogp(p):
    return np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), -1)


@pytest.mark.parametrize("base", [None, 2])
@pytest.mark.parametrize("form", FORMS)
def test_softmax(form, base):
    targets, t = FORMS[form]
    nats = 1 if base is None else LN2
    e = xj.explain(Z, targets, base=base)
    lse = np.log(np.exp(Z - Z.max(-1, keepdims=True)).sum(-1)) + Z.max(-1)
    s = lse[:, None] - Z
    p, total = np.exp(-s), t.sum(-1)
    truth = t / np.where(total == 0, 1, total)[:, None]
    wanted = {
        "probabilities": p,
        "surprisals": s / nats,
        "targets": t,
        "mass": total,
        "shares": t * s / nats,
        "losses": (t * s).sum(-1) / nats,
        "gradients": (total[:, None] * p - t) / nats,
        "entropy": (p * s).sum(-1) / nats,
        "target_entropy": -plogp(truth) / nats,
        "cross_entropy": (truth * s).sum(-1) / nats,
        "kl_divergence": ((truth * s).sum(-1) + plogp(truth)) / nats,
        "perplexity": np.exp((truth * s).sum(-1)),
    }
    # Smoothing's share came as float32.
    for name, want in wanted.items():
        got = getattr(e, name)
        assert (got.dtype, got.shape) == (np.float64, want.shape), name
        # Where p is 1 to six digits, the plain formulas here keep ten digits.
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=3e-8, err_msg=name)
    np.testing.assert_allclose(e.losses, e.shares.sum(-1), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("base", [None, 2])
@pytest.mark.parametrize("given", ["logits", "probabilities"])
def test_sigmoid(given, base):
    t = np.array([[1.0, 0.0, 0.25, 1.0], [1.0, 0.0, 1.0, 0.0]])
    nats = 1 if base is None else LN2
    p = 1 / (1 + np.exp(-Z))
    e = xj.explain(Z if given == "logits" else p, t, given=given, link="sigmoid", base=base)
    yes, no = np.log1p(np.exp(-Z)), np.log1p(np.exp(Z))
    shares = t * yes + (1 - t) * no
    least = -(plogp(t[..., None]) + plogp(1 - t[..., None])).sum(-1)
    wanted = {
        "probabilities": p,
        "surprisals": yes / nats,
        "surprisals_of_no": no / nats,
        "shares": shares / nats,
        "losses": shares.sum(-1) / nats,
        "gradients": (p - t) / nats,
        "entropy": (p * yes + (1 - p) * no).sum(-1) / nats,
        "target_entropy": least / nats,
        "cross_entropy": shares.sum(-1) / nats,
        "kl_divergence": (shares.sum(-1) - least) / nats,
    }
    for name, want in wanted.items():
        np.testing.assert_allclose(getattr(e, name), want, rtol=1e-8, atol=1e-9, err_msg=name)


def test_exact_where_float32_has_nothing_left():
    e = xj.explain(jnp.array([20.0, 5.0]), 0)
    np.testing.assert_allclose(e.losses, math.log1p(math.exp(-15)), rtol=1e-13)
    np.testing.assert_allclose(e.gradients, [-1 / (1 + math.exp(15)), 1 / (1 + math.exp(15))])
    assert xj.explain(np.array([1e299, 0.0]), 1).losses == 1e299
    ruled_out = xj.explain([0, 0.5, 0.5], 0, given="probabilities")
    assert ruled_out.losses == ruled_out.kl_divergence == math.inf
    assert "nan" not in str(ruled_out) + ruled_out._repr_html_()


def test_kinds_of_prediction_agree():
    p = np.array([0.1, 0.2, 0.7])
    by_kind = [
        xj.explain(np.log(p), 2),
        xj.explain(p, 2, given="probabilities"),
        xj.explain(30 * p, 2, given="weights"),
        xj.explain(jnp.asarray(p, jnp.float32), 2, given="probabilities"),
        xj.explain(jnp.asarray(p, jnp.bfloat16), 2, given="probabilities"),
    ]
    for e, rtol in zip(by_kind, [1e-12, 1e-12, 1e-12, 1e-6, 1e-2], strict=True):
        np.testing.assert_allclose(e.gradients, [0.1, 0.2, -0.3], rtol=rtol)


def test_one_example_of_a_batch():
    batch = xj.explain(Z, LABELS, classes="abcd")
    one = xj.explain(Z[1], LABELS[1], classes="abcd")
    assert str(batch[1]) == str(one)
    assert str(batch) == f"Example 0. {batch[0]}\n\nExample 1. {batch[1]}"
    assert repr(one) == str(one)


def test_long_batches_and_long_rows_are_cut():
    many = xj.explain(Z, LABELS)[[0] * 10]
    assert str(many).endswith("\n\n… and 2 more examples")
    assert "… and 2 more examples" in many._repr_html_()
    long = xj.explain(np.arange(50.0), 0)
    assert long._repr_html_().count("<tr>") == 1 + 40
    assert ">… and 10 more classes<" in long._repr_html_()
    assert ">0</td>" in long._repr_html_()  # The label's own class is shown, however unlikely.


class Tags(HTMLParser):
    """Asserts that every tag is closed in its turn."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_html_has_the_numbers_of_the_text(link):
    e = xj.explain([2.0, -1.0, 0.5], [1.0, 0.0, 0.0], link=link, classes=["<a>", "b & c", "d"])
    tags = Tags()
    tags.feed(e._repr_html_())
    assert not tags.open
    cells = [word for text in tags.text for word in text.split()]
    table = str(e).split("\n\n")[1].splitlines()[3:]
    for number in re.findall(r"-?\d+\.\d{4}", " ".join(table)):
        assert number in cells
    assert "<a>" in tags.text
    widths = [float(w) for w in re.findall(r"width:(\d+\.\d)%", e._repr_html_())]
    assert widths[::4] == [round(100 * float(p), 1) for p in e.probabilities]


@pytest.mark.parametrize(
    "settings",
    [
        {"jax_enable_x64": True},
        {"jax_numpy_rank_promotion": "raise", "jax_numpy_dtype_promotion": "strict"},
    ],
    ids=str,
)
def test_the_same_under_every_setting(settings):
    want = str(xj.explain(Z, LABELS))
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        assert str(xj.explain(Z, LABELS)) == want
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


P = [0.1, 0.2, 0.7]
BAD = [
    ((P, 3), {}, ValueError, r"targets: expected labels in \[0, 3\) .*, got 3"),
    ((P, [0, 1]), {}, ValueError, r"targets: expected shape \(\) for labels"),
    ((P, 0), {"given": "odds"}, ValueError, "given: expected one of .*, got 'odds'"),
    ((P, 0), {"link": "probit"}, ValueError, "link: expected one of .*, got 'probit'"),
    ((P, P), {"link": "sigmoid", "given": "weights"}, ValueError, "given: expected .*'weights'"),
    ((P, 0), {"base": 1}, ValueError, "base: expected .*, got 1"),
    ((P, 0), {"classes": ["a", "b"]}, ValueError, r"classes: expected 3 .*, got \['a', 'b'\]"),
    ((P, 0), {"classes": ["a", "b", "b"]}, ValueError, "classes: expected 3 different names"),
    (([0.1, 0.2], 0), {"given": "probabilities"}, ValueError, "which sum to 0.3"),
    (([-0.1, 1.1], 0), {"given": "probabilities"}, ValueError, "prediction: expected prob.*-0.1"),
    (([0, 0], 0), {"given": "weights"}, ValueError, "prediction: expected weights .*got"),
    (([math.nan, 0], 0), {}, ValueError, "prediction: expected logits .*nan"),
    (([math.inf, 0], 0), {}, ValueError, "prediction: expected logits .*inf"),
    (([-math.inf] * 2, 0), {}, ValueError, "prediction: expected at least one logit above −inf"),
    (([2.0], [1.0]), {"link": "sigmoid", "given": "probabilities"}, ValueError, "from 0 to 1, got"),
    ((0.5, 0), {}, ValueError, r"prediction: expected numbers \[..., V\] .*, got shape \(\)"),
    (([], 0), {}, ValueError, r"prediction: expected numbers \[..., V\] .*, got shape \(0,\)"),
    (("abc", 0), {}, TypeError, "prediction: expected numbers, got 'abc'"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD, ids=lambda x: str(x)[:40])
def test_bad_arguments(args, options, error, message):
    with pytest.raises(error, match=f"^{message}" if ":" in message else message):
        xj.explain(*args, **options)


def test_traced_predictions_are_refused():
    with pytest.raises(TypeError, match=r"prediction: expected values, got a traced array"):
        jax.jit(lambda z: xj.explain(z, 0).losses)(jnp.zeros(3))
