"""The numbers that the papers report, and the names of losses in tables."""

from __future__ import annotations

__all__ = ["REPORTED", "SOURCE", "label", "reported_cell"]

SOURCE = "de Brébisson & Vincent 2015, arXiv:1511.05042"

# Test errors in per cent, and the test perplexity on Penn Treebank, by data set and then by loss.
# They are as summaries of the paper give them; it reports no number of runs and no spread.
REPORTED: dict[str, dict[str, float]] = {
    "mnist": {"softmax": 0.812, "taylor_softmax": 0.785, "spherical_softmax": 0.828},
    "cifar10": {"softmax": 8.52, "taylor_softmax": 8.07, "spherical_softmax": 8.37},
    "cifar100": {"softmax": 32.4, "taylor_softmax": 33.1, "spherical_softmax": 33.1},
    "ptb": {"softmax": 126.7, "taylor_softmax": 147.2, "spherical_softmax": 149.2},
}

LABELS = {
    "softmax": "softmax",
    "taylor_softmax": "log-Taylor softmax",
    "higher_taylor_softmax:order=4": "log-Taylor softmax of order 4",
    "spherical_softmax": "log-spherical softmax",
    "z_loss": "Z-loss",
    "squared_error": "squared error",
    "bohning_bound": "Böhning's bound",
    "bouchard_bound": "Bouchard's bound",
    "soft_margin_softmax": "soft-margin softmax",
    "soft_margin_softmax:order=2": "soft-margin Taylor softmax",
    "adaptive_softmax": "adaptive softmax",
    "hierarchical_softmax": "hierarchical softmax",
    "sampled_softmax": "sampled softmax",
}
WORDS = {"prior": "base measure", "factored": "factored, SGD", "tied": "tied", "lstm": "LSTM"}


def label(name: str) -> str:
    """Returns the name of a loss or an output layer in a table.

    >>> label("taylor_softmax prior factored depth=2")
    'log-Taylor softmax, base measure, factored, SGD, depth 2'
    >>> label("softmax clusters=16 shortlist=100 by=frequency leaf_features=8")
    'softmax, 16 clusters, shortlist 100, by frequency, leaves of width 8'
    """
    loss, *words = name.split()
    return ", ".join([_loss_in_words(loss), *map(_phrase, words)])


def _loss_in_words(loss: str) -> str:
    """Returns a loss and the numbers that were given for it.

    >>> _loss_in_words("z_loss:a=1:b=8"), _loss_in_words("my_loss:eps=1")
    ('Z-loss (a 1, b 8)', 'my_loss:eps=1')
    """
    kind, *numbers = loss.split(":")
    if loss in LABELS or kind not in LABELS:
        return LABELS.get(loss, loss)
    return f"{LABELS[kind]} ({', '.join(numbers).replace('=', ' ')})"


def _phrase(word: str) -> str:
    """Returns a word of a name in a table.

    >>> _phrase("prior"), _phrase("clusters=1"), _phrase("cutoffs=9,99"), _phrase("div_value=1.0")
    ('base measure', 'one cluster', 'cutoffs 9 and 99', 'div_value 1')
    """
    key, _, value = word.removesuffix(".0").partition("=")
    if key == "clusters":
        return "one cluster" if value == "1" else f"{value} clusters"
    if key == "leaf_features":
        return f"leaves of width {value}"
    if key == "samples":
        return f"{value} samples"
    return WORDS.get(word, f"{key} {value.replace(',', ' and ')}" if value else key)


def reported_cell(dataset: str, name: str) -> str:
    """Returns the paper's number, or a dash.

    >>> reported_cell("mnist", "softmax"), reported_cell("mnist", "z_loss")
    ('0.812', '–')
    """
    value = REPORTED.get(dataset, {}).get(name)
    return "–" if value is None else f"{value:g}"
