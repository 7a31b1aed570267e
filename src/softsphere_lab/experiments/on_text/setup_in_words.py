"""The text, the networks and the training of an experiment on text, in words."""

from __future__ import annotations

from collections.abc import Iterable

from softsphere_lab.models.output_layers import Output
from softsphere_lab.records.folder import Line
from softsphere_lab.report.results import Results

__all__ = ["outputs_named", "text_setup"]


def outputs_named(names: Iterable[str]) -> dict[str, Output]:
    """Reads the names of output layers in a record. Sections read them here and nowhere else."""
    return {name: Output.parse(name) for name in names}


def text_setup(results: Results) -> str:
    """Returns sentences about the text, the networks and their training."""
    asked, data = results.config, results.config["data"]
    outputs = outputs_named(asked["outputs"]).values()
    networks = []
    if not all(output.lstm for output in outputs):
        depths = sorted({output.depth or asked["depth"] for output in outputs})
        layers = " or ".join(map(str, depths))
        wider = f" (of width {asked['hidden']} but for the last)" if max(depths) > 1 else ""
        linear = ", the last without activation" if asked.get("linear_last") else ""
        networks.append(
            f"a {asked['n']}-gram model with embeddings of {asked['embedding']} and {layers} "
            f"hidden layers{wider}{linear}, dropout {asked['dropout']:g}"
        )
    if any(output.lstm for output in outputs):
        networks.append(_lstm_in_words(asked))
    trial = asked["trial_words"]
    return (
        f"{data['words']:,} words of vocabulary, {data['train']:,} of text to train on and "
        f"{data['test']:,} to test on. The network is {', or '.join(networks)}; its output is "
        f"{asked['width']} wide. Batches of {asked['batch_size']} words, "
        f"{_epochs(asked['epochs'])}; in the search {_epochs(asked['trial_epochs'])} "
        f"of {'all words' if trial is None else f'the first {trial:,} words'}"
        f"{results.second_look}.{_steps_in_words(asked)}\n"
    )


def _lstm_in_words(asked: Line) -> str:
    """
    >>> _lstm_in_words({"embedding": 8, "length": 32, "layers": 2, "context": 16})
    'an LSTM of 2 layers with embeddings of 8 on windows of 32 words, each after the 16 before it'
    >>> streams = {"context": 64, "carried": True, "batch_size": 512}
    >>> _lstm_in_words({"embedding": 8, "length": 32, **streams})
    'an LSTM with embeddings of 8 on windows of 32 words of 16 streams of text, whose states are \
carried from each window to the next in training; in evaluation each after the 64 before it'
    """
    layers = f" of {asked['layers']} layers" if "layers" in asked else ""
    dropout = f", dropout {asked['recurrent_dropout']:g}" if "recurrent_dropout" in asked else ""
    context = f"each after the {asked['context']} before it" if "context" in asked else ""
    if asked.get("carried"):
        context = (
            f" of {asked['batch_size'] // asked['length']} streams of text, whose states are "
            "carried from each window to the next in training; in evaluation "
            f"{context or 'each from a zero state'}"
        )
    elif context:
        context = f", {context}"
    return (
        f"an LSTM{layers} with embeddings of {asked['embedding']}{dropout} on windows of "
        f"{asked['length']} words{context}"
    )


def _steps_in_words(asked: Line) -> str:
    """Returns a sentence about steps that are not as PyTorch's defaults have them, if any are not.

    >>> _steps_in_words({"warm_up": 0.1, "clip": 1.0, "beta2": 0.99})
    ' The rate rises in the first 10 % of the steps; gradients are cut to a norm of 1; β₂ is 0.99.'
    >>> _steps_in_words({"optimizer": "sgd", "clip": 0.25})
    ' Plain SGD takes the steps; gradients are cut to a norm of 0.25.'
    """
    parts = []
    if asked.get("optimizer") == "sgd":
        parts.append("plain SGD takes the steps")
    if "warm_up" in asked:
        parts.append(f"the rate rises in the first {100 * asked['warm_up']:g} % of the steps")
    if "clip" in asked:
        parts.append(f"gradients are cut to a norm of {asked['clip']:g}")
    if "beta2" in asked:
        parts.append(f"β₂ is {asked['beta2']:g}")
    told = "; ".join(parts)
    return f" {told[0].upper()}{told[1:]}." if told else ""


def _epochs(epochs: int) -> str:
    """
    >>> _epochs(1), _epochs(2)
    ('1 epoch', '2 epochs')
    """
    return f"{epochs} epoch" if epochs == 1 else f"{epochs} epochs"
