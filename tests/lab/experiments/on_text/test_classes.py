"""What is said of the number of classes."""

from __future__ import annotations

from _lab_results import results_of, text_end
from softsphere_lab.experiments.on_text.classes import classes_section


def test_classes_say_where_the_order_turns():
    ends = []
    for D, gap in ((10, -0.1), (100, 0.2)):
        for seed in range(3):
            ends.append(text_end(f"softmax classes={D}", seed, 3.0 + 0.01 * seed))
            ends.append(
                text_end(f"taylor_softmax prior classes={D}", seed, 3.0 + gap + 0.011 * seed)
            )
    found = classes_section(results_of(ends)).finding.splitlines()
    assert found[2:] == [
        "- log-Taylor softmax, base measure: 0.906 at 10 classes and 1.223 at 100; interval below "
        "1 at 10; interval above 1 at 100; p < 0.05 at 10, 100."
    ]
    # one seed has neither an interval nor a test
    alone = classes_section(results_of([line for line in ends if line["seed"] == 0])).finding
    assert alone.endswith("base measure: 0.905 at 10 classes and 1.221 at 100.")
    # lower on average, by less than chance
    alike = [text_end(f"{loss} classes=10", seed, 3.0 + (seed + (loss != "softmax")) % 3 * 0.01
                 - 0.001 * (loss != "softmax"))
             for loss in ("softmax", "taylor_softmax") for seed in range(3)]  # fmt: skip
    assert classes_section(results_of(alike)).finding.endswith("softmax: 0.999 at 10 classes.")


def test_the_ratios_by_classes_are_told_by_the_interval_and_by_the_test_each():
    """Many comparisons, of which none is sure: intervals apart from 1, no p below 0.05."""
    spread = (-0.02, 0.0, 0.03)
    ends = []
    for D in range(10, 30):
        for seed in range(3):
            ends.append(text_end(f"softmax classes={D}", seed, 3.0))
            ends.append(text_end(f"taylor_softmax classes={D}", seed, 3.1 + spread[seed]))
    found = classes_section(results_of(ends)).finding
    assert "interval above 1 at 10, 11," in found and "p <" not in found
