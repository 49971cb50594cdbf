"""An explanation in plain text: a table of the classes, and the links in words."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from xentjax._explain.text import definitions, paragraph, table

if TYPE_CHECKING:
    from xentjax._explain.explanation import Explanation

MAX_TERMS = 4  # A sum of more terms is not written out.
MAX_EXAMPLES = 8  # More examples of a batch are not printed.


def report(e: "Explanation") -> str:
    """Returns the text of each example, and says how many were left out."""
    parts = ["\n".join(_example(one, name)) for name, one in examples(e)]
    left = e.losses.size - len(parts)
    return "\n\n".join([*parts, *[f"… and {left} more examples"] * (left > 0)])


def examples(e: "Explanation") -> Iterator[tuple[str, "Explanation"]]:
    """Yields the first examples of a batch with their names; "" where there is one alone."""
    for index in list(np.ndindex(e.losses.shape))[:MAX_EXAMPLES]:
        name = ", ".join(map(str, index))
        yield (f"Example {name}. " if index else ""), e[index]


def _example(e: "Explanation", name: str) -> list[str]:
    return [
        *paragraph(f"{name}{title(e)}"),
        "",
        *table([[f"{head}\n{symbol}", *cells] for head, symbol, cells in columns(e)]),
        "",
        *definitions(_links(e)),
    ]


def title(e: "Explanation") -> str:
    """Returns how many classes there are, the truth and the unit."""
    if e.link == "sigmoid":
        names = [name for name, t in zip(e.classes, e.targets, strict=True) if t == 1]
        soft = bool(np.any((e.targets != 0) & (e.targets != 1)))
        truth = "a share of yes for each class" if soft else ", ".join(names) or "no class"
    else:
        truth = e.classes[_label(e)] if _is_label(e) else "a mass on each class"
    return f"Classes: {len(e.classes)}. Truth: {truth}. Unit: {e.unit}."


def columns(e: "Explanation") -> list[tuple[str, str, list[str]]]:
    """Returns the table of the classes: name, symbol and cells of each column."""
    found: list[tuple[str, str, np.ndarray]] = [
        ("probability", "p_v", e.probabilities),
        ("surprisal", "s_v", e.surprisals),
        ("truth", "t_v", e.targets),
        ("share", "t_v·s_v", e.shares),
        ("gradient", "g_v", e.gradients),
    ]
    if e.surprisals_of_no is not None:
        found.insert(2, ("if-no", "s̄_v", e.surprisals_of_no))
        found[4] = ("share", "l_v", e.shares)
    if e.given != "probabilities":
        name, symbol = {"logits": ("logit", "z_v"), "weights": ("weight", "w_v")}[e.given]
        found.insert(0, (name, symbol, e.prediction))
    cells = [(name, symbol, list(map(decimals, values))) for name, symbol, values in found]
    return [("class", "v", list(e.classes)), *cells]


def _links(e: "Explanation") -> list[tuple[str, ...]]:
    """Returns the links in words: name, formula with its value, meaning."""
    return _sigmoid_links(e) if e.link == "sigmoid" else _softmax_links(e)


def _softmax_links(e: "Explanation") -> list[tuple[str, ...]]:
    p, s, t, unit = e.probabilities, e.surprisals, e.targets, e.unit
    if _weighted(e):
        t = t / np.where(e.mass == 0, 1, e.mass)
    return [
        *_to_probabilities(e),
        (
            "surprisal",
            f"s_v = −{_log(e)} p_v",
            "How surprising class v would be: the less likely, the more.",
        ),
        (
            "entropy",
            f"H(p) = Σ_v p_v · s_v = {decimals(e.entropy)} {unit}",
            *_written_out(p, s),
            "The mean surprisal that the prediction itself expects.",
        ),
        ("truth", *_truth(e), "The distribution that the prediction is held against."),
        (
            "target",
            f"H(t) = −Σ_v t_v · {_log(e)} t_v = {decimals(e.target_entropy)} {unit}",
            "The entropy of the truth: no prediction has a smaller cross-entropy.",
        ),
        (
            "cross-entropy",
            f"H(t, p) = Σ_v t_v · s_v = {decimals(e.cross_entropy)} {unit}",
            *_written_out(t, s),
            "The mean surprisal that the prediction meets where t is the truth.",
        ),
        (
            "KL",
            f"H(t, p) − H(t) = {decimals(e.kl_divergence)} {unit}",
            "The divergence: the part of it that a better prediction would save.",
        ),
        (
            "loss",
            f"{_loss(e)} = {decimals(e.losses)} {unit}",
            "lse(z) = log Σ_v exp(z_v)" + _logits_of(e),
            _loss_in_words(e),
        ),
        (
            "perplexity",
            f"{_power(e)}^H(t, p) = {_perplexity_text(e)}",
            "As surprised as by one of so many equally likely classes.",
        ),
        ("gradient", f"g_v = ∂loss/∂z_v = {_per_unit(e, _error(e))}", _GRADIENT),
    ]


def _sigmoid_links(e: "Explanation") -> list[tuple[str, ...]]:
    unit = e.unit
    return [
        *_to_probabilities(e),
        (
            "surprisal",
            f"s_v = −{_log(e)} p_v, s̄_v = −{_log(e)}(1 − p_v)",
            "How surprising a yes of class v would be, and a no.",
        ),
        (
            "entropy",
            f"H(p) = Σ_v p_v · s_v + (1 − p_v) · s̄_v = {decimals(e.entropy)} {unit}",
            "The sum of the losses that the answers themselves expect.",
        ),
        (
            "target",
            f"H(t) = {decimals(e.target_entropy)} {unit}",
            "The entropy of the truth: no prediction has a smaller loss.",
        ),
        (
            "loss",
            f"Σ_v l_v, l_v = t_v · s_v + (1 − t_v) · s̄_v, Σ_v l_v = {decimals(e.losses)} {unit}",
            *([f"= {' + '.join(map(decimals, e.shares))}"] if len(e.shares) <= MAX_TERMS else []),
            "Each class is a question of its own, and its losses are added.",
        ),
        (
            "KL",
            f"loss − H(t) = {decimals(e.kl_divergence)} {unit}",
            "The divergence: the part of the loss that a better prediction would save.",
        ),
        ("gradient", f"g_v = ∂loss/∂z_v = {_per_unit(e, 'p_v − t_v')}", _GRADIENT),
    ]


def _to_probabilities(e: "Explanation") -> list[tuple[str, ...]]:
    """Returns the link from the numbers given to probabilities, where they are others."""
    if e.given == "weights":
        formula = f"p_v = w_v / Σ_u w_u, Σ_u w_u = {decimals(e.prediction.sum())}"
        return [("normalize", formula, "The weights as probabilities.")]
    if e.given == "probabilities":
        return []
    if e.link == "sigmoid":
        return [("sigmoid", "p_v = 1 / (1 + exp(−z_v))", "Each logit as a probability of yes.")]
    return [("softmax", "p_v = exp(z_v) / Σ_u exp(z_u)", "The logits as probabilities.")]


_GRADIENT = "A step against it moves p towards t, fastest where they differ most."


def _is_label(e: "Explanation") -> bool:
    """Returns whether the truth of one example is 1 for one class and 0 for others."""
    return int(np.sum(e.targets != 0)) == 1 and float(e.targets.max()) == 1


def _label(e: "Explanation") -> int:
    return int(e.targets.argmax())


def _truth(e: "Explanation") -> tuple[str, ...]:
    if _is_label(e):
        return (f"t_v = 1 for {e.classes[_label(e)]}, 0 for others",)
    total = f"T = Σ_v t_v = {decimals(e.mass)}"
    return (f"{total}; in H(t) and H(t, p), t is t / T" if _weighted(e) else total,)


def _weighted(e: "Explanation") -> bool:
    """Returns whether the mass is visibly not 1."""
    return not np.isclose(e.mass, 1, rtol=1e-6)


def _loss(e: "Explanation") -> str:
    label = e.classes[_label(e)]
    return _per_unit(e, f"lse(z) − z_{label}" if _is_label(e) else "Σ_v t_v · (lse(z) − z_v)")


def _loss_in_words(e: "Explanation") -> str:
    if not np.isfinite(e.losses):
        return "The prediction says 0 where the truth does not, and nothing costs more."
    if _weighted(e):
        return "T times the cross-entropy of the truth t / T: the classes are weighted."
    return "The same number from the logits, as training computes it."


def _logits_of(e: "Explanation") -> str:
    return {"probabilities": ", z = log p", "weights": ", z = log w"}.get(e.given, "")


def _error(e: "Explanation") -> str:
    return "T · p_v − t_v" if _weighted(e) else "p_v − t_v"


def _per_unit(e: "Explanation", formula: str) -> str:
    """Returns a formula in nats divided by the unit's nats."""
    return formula if e.base is None else f"({formula}) / ln {e.base:g}"


def _log(e: "Explanation") -> str:
    return "log" if e.base is None else f"log{e.base:g}"


def _power(e: "Explanation") -> str:
    return "e" if e.base is None else f"{e.base:g}"


def _perplexity_text(e: "Explanation") -> str:
    """Returns five digits: exp makes the absolute error of the loss a relative one."""
    if np.isfinite(e.cross_entropy) and not np.isfinite(e.perplexity):
        return "more than 1.8e+308"
    return f"{e.perplexity:#.5g}"


def _written_out(shares: np.ndarray, values: np.ndarray) -> list[str]:
    """Returns [a·b + …] for the shares that are not 0; [] where they are too many to read."""
    terms = [f"{decimals(a)}·{decimals(b)}" for a, b in zip(shares, values, strict=True) if a > 0]
    return ["= " + " + ".join(terms)] if 0 < len(terms) <= MAX_TERMS else []


def decimals(x: np.ndarray | float) -> str:
    """Returns x with four decimals, or four digits where those would not show it."""
    if x == 0 or not np.isfinite(x) or 1e-3 <= abs(x) < 1e5:
        return f"{x + 0.0:.4f}"  # + 0.0 takes the sign from −0.
    return f"{x:.3e}"
