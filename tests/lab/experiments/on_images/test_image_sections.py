"""The sections of the experiments on images."""

from __future__ import annotations

from _lab_results import image_end, results_of
from softsphere_lab.experiments.on_images.image_sections import image_section


def test_a_run_that_diverged_is_marked():
    found = results_of([image_end("softmax", 0, 0.9, diverged=True)], epochs=1)
    assert "| 1 (1 diverged) |" in image_section(found).table


def test_it_says_which_losses_differ_and_no_more():
    ends = []
    for seed in range(4):
        wobble = 0.001 * (seed % 2)
        ends.append(image_end("softmax", seed, 0.10 + wobble))
        ends.append(image_end("taylor_softmax", seed, 0.08 + wobble + 0.0001 * seed))
        ends.append(image_end("z_loss", seed, 0.101 - wobble))
    found = image_section(results_of(ends)).finding
    assert found.startswith(
        "Better in test error than softmax (10.05 %): log-Taylor softmax (8.07 %, p < 0.001)."
    )
    assert "Not shown to differ in test error from softmax (10.05 %): Z-loss." in found
    few = image_section(results_of([line for line in ends if line["seed"] < 2])).finding
    assert few.startswith("No loss was tested")


def test_better_and_worse_are_of_the_seeds_that_p_is_of():
    errors = {
        "softmax": [0.12, 0.1201, 0.1202, *[0.08] * 7],
        "taylor_softmax": [0.11, 0.1102, 0.1101],
    }
    ends = [
        image_end(loss, seed, error)
        for loss, own in errors.items()
        for seed, error in enumerate(own)
    ]
    assert image_section(results_of(ends)).finding.startswith("Better in test error than softmax")
