"""What the experiments on text share: metrics, the table beside the paper's, pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

from softsphere_lab.experiments import text_pictures as pictures
from softsphere_lab.experiments.experiment import Ran, Section
from softsphere_lab.experiments.measures import (
    Metric,
    count,
    mean,
    p_values,
    ratio,
    settings,
    shown,
    times,
    told,
)
from softsphere_lab.experiments.paper import label, reported
from softsphere_lab.models.output_layers import Output
from softsphere_lab.records.folder import Line
from softsphere_lab.report.grids import markdown
from softsphere_lab.report.summary import REFERENCE
from softsphere_lab.training.language import MOST_NLL, perplexity

__all__ = ["PERPLEXITY", "REFERENCE", "beside_softmax", "ratios", "seconds_to", "setup", "tell"]

PERPLEXITY = Metric("test_nll", "test perplexity", 1, perplexity, figures=3)
TOP1 = Metric("test_top1", "top-1 %", 2, lambda share: 100 * share)
TOP10 = Metric("test_top10", "top-10 %", 2, lambda share: 100 * share)
MRR = Metric("test_mrr", "MRR", 4)
SIMLEX = Metric("simlex999", "SimLex-999", 3)
WORDSIM = Metric("wordsim353", "WordSim-353", 3)


def of_softmax(name: str) -> str:
    """The softmax that an output layer is compared with: on the same network.

    >>> of_softmax("taylor_softmax prior factored lstm")
    'softmax lstm'
    """
    return " ".join([REFERENCE, *(w for w in name.split()[1:] if w == "lstm")])


def tell(ran: Ran) -> Section:
    """Two tables, quality and cost, with tests of perplexity and rank against softmax."""
    reference = {name: of_softmax(name) for name in ran.ends}
    perplexity, rank = (p_values(ran.ends, metric, reference) for metric in (PERPLEXITY, MRR))
    header = ("output layer", "its numbers", "rate", "trials", "seeds", "paper's perplexity")
    columns = (PERPLEXITY.title, "p", TOP1.title, TOP10.title, MRR.title, "p", SIMLEX.title)
    quality = markdown(
        (*header, *columns, WORDSIM.title),
        [
            (
                label(name),
                *settings(runs),
                ran.tried(name),
                count(runs),
                reported(str(ran.config["dataset"]), name),
                told(runs, PERPLEXITY),
                shown(perplexity.get(name)),
                told(runs, TOP1),
                told(runs, TOP10),
                told(runs, MRR),
                shown(rank.get(name)),
                told(runs, SIMLEX),
                told(runs, WORDSIM),
            )
            for name, runs in ran.ends.items()
        ],
    )
    goals = goals_of(ran)
    cost = markdown(
        (
            "output layer",
            "computed by",
            "seconds an epoch",
            *(f"seconds to validation perplexity {goal}" for goal in goals),
        ),
        [
            (
                label(name),
                engine(runs),
                per_epoch(ran, name),
                *(seconds_to(ran, name, goal) for goal in goals),
            )
            for name, runs in ran.ends.items()
        ],
    )
    finding = ratios(ran, reference)
    return Section(
        text=f"{setup(ran)}\n{quality}\n{covered(ran)}\n\n{cost}\n{finding}\n",
        table=quality,
        finding=finding,
        pictures={"curves": partial(pictures.curves, ran)},
    )


def beside_softmax(
    ran: Ran,
    reference: Mapping[str, str],
    p: Mapping[str, float],
    columns: Mapping[str, Callable[[str], str]],
) -> str:
    """A table of perplexities, each also in times that of the softmax it is compared with.

    reference: that softmax, by name. columns: what they say of a name, by title, before the others.
    """
    header = ("its numbers", "rate", "trials", "seeds", PERPLEXITY.title, "times softmax", "p")
    return markdown(
        (*columns, *header),
        [
            (
                *(said(name) for said in columns.values()),
                *settings(ran.ends[name]),
                ran.tried(name),
                count(ran.ends[name]),
                told(ran.ends[name], PERPLEXITY),
                times(ran.ends, name, other, PERPLEXITY),
                shown(p.get(name)),
            )
            for name, other in reference.items()
        ],
    )


def setup(ran: Ran) -> str:
    """The text, the networks and their training, in a few sentences."""
    asked, data = ran.config, ran.config["data"]
    outputs = [Output.parse(name) for name in asked["outputs"]]
    networks = []
    if not all(output.lstm for output in outputs):
        depths = sorted({output.depth or asked["depth"] for output in outputs})
        layers = " or ".join(map(str, depths))
        wider = f" (of width {asked['hidden']} but for the last)" if max(depths) > 1 else ""
        networks.append(
            f"a {asked['n']}-gram model with embeddings of {asked['embedding']} and {layers} "
            f"hidden layers{wider}, dropout {asked['dropout']:g}"
        )
    if any(output.lstm for output in outputs):
        networks.append(
            f"an LSTM with embeddings of {asked['embedding']} on windows of {asked['length']} words"
        )
    trial = asked["trial_words"]
    return (
        f"{data['words']:,} words of vocabulary, {data['train']:,} of text to train on and "
        f"{data['test']:,} to test on. The network is {', or '.join(networks)}; its output is "
        f"{asked['width']} wide. Batches of {asked['batch_size']} words, "
        f"{counted(asked['epochs'])}; in the search {counted(asked['trial_epochs'])} of "
        f"{'all words' if trial is None else f'the first {trial:,} words'}{ran.looked}.\n"
    )


def counted(epochs: int) -> str:
    """So many epochs."""
    return f"{epochs} epoch" if epochs == 1 else f"{epochs} epochs"


def engine(runs: Mapping[int, Line]) -> str:
    """How the layer was computed, as the runs say."""
    return ", ".join(sorted({line["final"]["engine"] for line in runs.values()}))


def covered(ran: Ran) -> str:
    """How many pairs of words the correlations are of."""
    final = next(iter(ran.lines))["final"]
    return (
        f"Correlations are of {final['simlex999_pairs']} pairs of SimLex-999 and "
        f"{final['wordsim353_pairs']} of WordSim-353 whose words the vocabulary has."
    )


def per_epoch(ran: Ran, name: str) -> str:
    """Mean over all epochs of all seeds."""
    own = [line["seconds"] for line in ran.epochs if line["loss"] == name]
    return f"{sum(own) / len(own):.1f}" if own else "–"


def goals_of(ran: Ran) -> list[int]:
    """Validation perplexities: one that all layers come to and one that half of them do.

    Rounded up to tens; none where no layer has a perplexity.
    """
    nlls = [mean(runs, Metric("valid_nll", "", 1)) for runs in ran.ends.values()]
    ends = sorted(math.exp(nll) for nll in nlls if nll is not None and nll < MOST_NLL)
    if not ends:
        return []
    found = (10 * math.ceil(end / 10) for end in (ends[-1], ends[(len(ends) - 1) // 2]))
    return list(dict.fromkeys(found))


def seconds_to(ran: Ran, name: str, goal: float) -> str:
    """Seconds of training until a validation perplexity: between epochs log perplexity is a line.

    The mean over the seeds; a dash if a seed does not come to it, and at most where one comes to it
    within its first epoch.
    """
    taken, most = [], False
    for seed in ran.ends[name]:
        own = [x for x in ran.epochs if x["loss"] == name and x["seed"] == seed]
        passed, before = 0.0, None
        for line in sorted(own, key=lambda line: line["epoch"]):
            nll, seconds = line["valid_nll"], line["seconds"]
            if nll is None:
                return "–"
            if nll <= math.log(goal):
                most |= before is None
                share = 1.0 if before is None else (before - math.log(goal)) / (before - nll)
                taken.append(passed + share * seconds)
                break
            passed, before = passed + seconds, nll
        else:
            return "–"
    return f"{'≤ ' if most else ''}{sum(taken) / len(taken):.0f}" if taken else "–"


def ratios(ran: Ran, reference: Mapping[str, str]) -> str:
    """How many times softmax's each perplexity is, in a sentence."""
    parts = []
    for name, other in reference.items():
        compared = None if name == other else ratio(ran.ends, name, other, PERPLEXITY)
        if compared is not None:
            middle, low, high = compared
            spread = "" if math.isnan(low) else f" ({low:.3f} to {high:.3f})"
            parts.append(f"{label(name)} {middle:.3f}{spread}")
    if not parts:
        return "No output layer can be compared with softmax yet."
    return (
        "Test perplexity in times that of softmax on the same network, with 95 % intervals over "
        f"the seeds: {'; '.join(parts)}."
    )
