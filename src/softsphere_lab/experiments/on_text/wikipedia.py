"""Wikipedia with some 75,000 words, in place of the One Billion Word text."""

from __future__ import annotations

from dataclasses import replace

from softsphere_lab.experiments.experiment import StudyReproduction
from softsphere_lab.experiments.on_text import ptb
from softsphere_lab.experiments.on_text.text_sections import text_section
from softsphere_lab.models.output_layers import Output
from softsphere_lab.training.language_run import Setup

__all__ = ["EXPERIMENT"]

FULL = replace(
    ptb.FULL,
    dataset="wikipedia",
    outputs=(*ptb.OUTPUTS, Output("softmax", lstm=True), Output("taylor_softmax", lstm=True)),
    seeds=(0, 1, 2),
    setup=Setup(batch_size=1024, epochs=2, held=100_000),
    trial_words=2_000_000,
)

EXPERIMENT = StudyReproduction(
    name="wikipedia",
    title="Wikipedia",
    claim=(
        "With many more classes than Penn Treebank has, softmax is further ahead of the spherical "
        "losses in perplexity, and they are further ahead in time (arXiv:1511.05042 on One Billion "
        "Word, whose 793,471 words take its place there)."
    ),
    differences=(
        "Wikipedia is a stand-in for One Billion Word: its articles are in lower case, paragraph "
        "by paragraph, and words seen fewer than three times are one unknown word. The paper's "
        "numbers on One Billion Word are known from a summary that seems to mislabel them, so they "
        "are not set beside these. At the budget small half of the vocabulary is never in the "
        "words trained on. " + ptb.DIFFERENCES
    ),
    studies={
        "smoke": ptb.EXPERIMENT.studies["smoke"],
        "small": replace(
            FULL,
            outputs=ptb.OUTPUTS,
            setup=replace(FULL.setup, train=1_000_000, epochs=1, held=20_000),
            trial_words=200_000,
            second_look=True,
        ),
        "full": FULL,
    },
    section_of=text_section,
    takes_nproc=True,
)
