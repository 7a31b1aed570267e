"""What a setup of a language model asks for is what its run does."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from _lab_results import ON_TEXT, STUDIES
from _lab_studies import TEXT
from softsphere_lab.models.output_layers import Output
from softsphere_lab.models.text_networks import LSTM
from softsphere_lab.training.language_run import LATER, LanguageRun, Setup
from softsphere_lab.training.text_parts import window_parts

RECORDS = Path(__file__).parents[3] / "records"


def run_of(**setup) -> LanguageRun:
    asked = replace(TEXT.setup, **setup)
    return LanguageRun(TEXT.load().text, Output("softmax"), 3e-3, 0, asked)


def kept_configs() -> dict[str, dict]:
    found = {
        path.parent.name: json.loads(path.read_text()) for path in RECORDS.glob("*/config.json")
    }
    return {name: each for name, each in found.items() if each.get("experiment") in ON_TEXT}


def test_records_made_before_a_setup_had_some_fields_are_those_of_the_same_setup():
    configs = kept_configs()
    assert configs
    for name, config in configs.items():
        own = STUDIES[config["experiment"]].studies[config["budget"]].setup.config()
        assert {key: config.get(key) for key in own} == own, name
        assert not {*LATER} & {*config} - {*own}, name


def test_a_configuration_has_later_fields_where_they_are_not_at_their_default():
    assert not {*LATER} & {*Setup().config()}
    other = Setup(linear_last=True, warm_up=0.1, clip=1.0, beta2=0.9, layers=2,
                  recurrent_dropout=0.1, context=5)  # fmt: skip
    assert other.config() == asdict(other)


def test_the_last_layer_of_an_ngram_model_may_be_linear():
    assert isinstance(list(run_of().model)[-1], nn.ReLU)
    for activation in ("relu", "exp", "batchnorm"):
        layers = list(run_of(linear_last=True, activation=activation, depth=2).model)
        assert isinstance(layers[-1], nn.Linear)
        assert sum(isinstance(layer, nn.Linear) for layer in layers) == 2


@pytest.mark.parametrize("clip", [None, 0.05])
def test_gradients_are_cut_to_the_norm_that_was_asked_for(clip):
    one, norms = run_of(clip=clip), []

    def note(*_):
        every = [*one.model.parameters(), *one.head.parameters()]
        norms.append(torch.stack([p.grad.double().norm() for p in every]).norm())

    one.optimizers[0].register_step_pre_hook(note)
    one.epoch(lambda step: None)
    assert norms
    if clip is None:
        assert min(norms) > 0.1
    else:
        assert max(norms) < clip * (1 + 1e-5)


def test_the_rate_rises_over_the_warm_up():
    one, rates = run_of(warm_up=0.5), []
    one.epoch(lambda step: rates.append(one.rates[0].get_last_lr()[0]))
    whole = len(rates) * TEXT.setup.epochs
    rising = [rate for rate in rates[: whole // 2] if rate < 3e-3]
    assert rising == sorted(rising) and rising[0] < 3e-3 / 10


def test_the_optimizer_has_the_decay_that_was_asked_for():
    assert run_of().optimizers[0].param_groups[0]["betas"] == (0.9, 0.999)
    assert run_of(beta2=0.99).optimizers[0].param_groups[0]["betas"] == (0.9, 0.99)


def test_windows_begin_with_the_words_before_them_and_the_same_words_are_predicted():
    text = TEXT.load().text
    plain, longer = (window_parts(text, 32, "cpu", context) for context in (0, 40))
    for part, (x, y) in longer.items():
        assert x.shape == (len(y), 72) and torch.equal(y, plain[part][1])
        assert torch.equal(x[:, 40:], plain[part][0])
        assert torch.equal(x[1:, 8:40], x[:-1, 40:]) and (x[0, :40] == text.end).all()


def test_the_first_words_of_a_window_fill_the_state_of_an_lstm_and_give_no_rows():
    torch.manual_seed(0)
    model = LSTM(30, 4, 5, layers=2, dropout=0.5, context=3).eval()
    x = torch.randint(30, (2, 7))
    rows = model(x)
    model.context = 0
    torch.testing.assert_close(rows, model(x)[:, 3:])
    assert not torch.allclose(rows, model(x[:, 3:]))
    # dropout is of rows as well
    model.train()
    assert (model(x) == 0).any()
