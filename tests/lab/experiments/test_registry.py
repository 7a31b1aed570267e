"""The experiments by name: their budgets, and the names of what they compare."""

from __future__ import annotations

import pytest

from _lab_results import ON_TEXT, STUDIES
from softsphere_lab.experiments.experiment import BUDGETS
from softsphere_lab.experiments.on_engines.side_by_side import SideBySide
from softsphere_lab.models.output_layers import Output
from softsphere_lab.study.search import Axis

SEARCHED = [
    name for name, each in STUDIES.items() if not isinstance(each.studies["full"], SideBySide)
]


@pytest.mark.parametrize("name", SEARCHED)
def test_budgets_grow_and_every_name_is_its_own_output(name):
    studies = STUDIES[name].studies
    assert tuple(studies) == BUDGETS
    runs = [len(studies[budget].names) * len(studies[budget].seeds) for budget in BUDGETS]
    assert runs[0] < runs[1] <= runs[2]
    for study in studies.values():
        assert len(set(study.names)) == len(study.names)
        # the same search for all: along the same rates, from the same one
        assert len({study.space(each).axes["lr"] for each in study.names}) == 1
        for each in study.names:
            space = study.space(each)
            assert all(axis.start in axis.values for axis in space.axes.values())
            setting, lr = study.setting(each, space.start)
            assert setting.split(":")[0].split()[0] == each.split(":")[0].split()[0]
            assert lr == space.axes["lr"].start


@pytest.mark.parametrize(
    "output",
    [output for name in ON_TEXT
     for output in STUDIES[name].studies["full"].outputs],
    ids=str,
)  # fmt: skip
def test_the_name_of_an_output_layer_is_read_back(output):
    assert Output.parse(str(output)) == output
    axes = output.axes(Axis((0.01, 0.1), 0.01))
    candidate = output.at({name: axis.start for name, axis in axes.items()})
    assert Output.parse(str(candidate)) == candidate
    assert candidate.axes(Axis.fixed(0.1)) == {}


def test_full_mnist_has_the_losses_and_seeds_that_are_promised():
    full = STUDIES["mnist"].studies["full"]
    assert len(full.seeds) >= 10
    assert {*full.names} >= {
        "softmax",
        "taylor_softmax",
        "higher_taylor_softmax:order=4",
        "spherical_softmax",
        "z_loss",
        "squared_error",
        "bohning_bound",
        "bouchard_bound",
        "soft_margin_softmax",
        "soft_margin_softmax:order=2",
    }


def test_experiments_side_by_side_have_the_same_engines_at_every_budget():
    others = set(STUDIES) - set(SEARCHED)
    assert others == {"engines", "twins", "twins-float64"}
    for name in others:
        studies = STUDIES[name].studies
        assert tuple(studies) == BUDGETS
        assert len({study.names for study in studies.values()}) == 1
        assert STUDIES[name].timed
