"""What a setup of a language model asks for is what its run does."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from _lab_results import ON_TEXT, STUDIES
from _lab_studies import TEXT
from softsphere_lab.errors import LabError
from softsphere_lab.models.output_layers import Output, tied_rows
from softsphere_lab.models.text_networks import LSTM
from softsphere_lab.training.language_run import LATER, LanguageRun, Setup
from softsphere_lab.training.text_parts import window_parts

RECORDS = Path(__file__).parents[3] / "records"


def run_of(output: str = "softmax", **setup) -> LanguageRun:
    asked = replace(TEXT.setup, **setup)
    return LanguageRun(TEXT.load().text, Output.parse(output), 3e-3, 0, asked)


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
                  recurrent_dropout=0.1, context=5, carried=True, optimizer="sgd")  # fmt: skip
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


def test_the_optimizer_is_the_one_that_was_asked_for():
    """SGD moves a weight by its rate times the gradient, and AdamW by about its rate."""
    for name, moved in {
        "sgd": lambda p: 3e-3 * p.grad,
        "adamw": lambda p: 3e-3 * p.grad.sign(),
    }.items():
        one = run_of(optimizer=name)
        index = torch.arange(16)
        one.loss_of(index).backward()
        weight = one.head.weight
        before, expected = weight.detach().clone(), moved(weight)
        seen = weight.grad.abs() > 1e-4  # so large that AdamW's eps counts for nothing
        one.optimizers[0].step()
        assert seen.any()
        assert_close((before - weight.detach())[seen], expected[seen], rtol=1e-2, atol=1e-7)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(LabError, match=r"optimizer must be .*, got 'SGD'"):
        run_of(optimizer="SGD")


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


def test_windows_of_a_stream_follow_one_another_and_are_the_words_of_the_text():
    text = TEXT.load().text
    plain, read = window_parts(text, 32, "cpu", 5), window_parts(text, 32, "cpu", 5, streams=3)
    for part in ("valid", "test"):
        assert all(map(torch.equal, read[part], plain[part]))
    each = len(plain["train"][0]) // 3
    for now, all_windows in zip(read["train"], window_parts(text, 32, "cpu")["train"], strict=True):
        for stream in range(3):
            begin = stream * each
            assert torch.equal(now[stream::3], all_windows[begin : begin + each])
    with pytest.raises(LabError, match=r"--data-dir: .* no 100000 windows of 32"):
        window_parts(text, 32, "cpu", streams=100_000)


def test_a_state_is_carried_through_a_stream_and_through_it_alone():
    """Windows one after the other give what the whole stream gives at once."""
    torch.manual_seed(0)
    model = LSTM(30, 4, 5, layers=2, context=3, streams=2)
    x = torch.randint(30, (2, 12))
    parts = torch.cat([model(part) for part in x.split(4, 1)], 1)
    whole = model.eval()
    whole.context = 0
    torch.testing.assert_close(parts, whole(x))
    model.train()
    assert not torch.allclose(model(x[:, :4]), parts[:, :4])
    model.begin()
    torch.testing.assert_close(model(x[:, :4]), parts[:, :4])
    # evaluation leaves it as it is, and gradients end with a window
    kept = model.state.clone()
    model.eval()(x)
    assert torch.equal(model.state, kept) and not kept.requires_grad and kept.any()


def test_an_epoch_reads_the_streams_in_order_and_begins_each_anew():
    """In a run, each batch has the windows after those of the batch before."""
    one = run_of("softmax lstm", carried=True, length=16)
    x, _ = one.examples["train"]
    read, states = [], []

    def note(module, inputs):
        if module.training:
            read.append(inputs[0])
            states.append(module.state.clone())

    one.model.register_forward_pre_hook(note)
    for _ in range(2):
        one.epoch(lambda step: None)
        batches = len(read)
        assert torch.equal(torch.cat(read), x) and {len(each) for each in read} == {8}
        assert not states[0].any() and all(state.any() for state in states[1:])
        read.clear(), states.clear()
    assert batches > 3


@pytest.mark.parametrize(
    "output", ["softmax lstm tied", "sampled_softmax lstm tied samples=20",
               "adaptive_softmax lstm tied div_value=1.0 cutoffs=50"]
)  # fmt: skip
def test_a_tied_network_reads_the_rows_that_predict(output):
    one = run_of(output, embedding=16)
    assert not any(isinstance(module, nn.Embedding) for module in one.model.modules())
    words = one.embeddings()
    assert 0.05 < words.std() < 0.2  # as embeddings begin
    # the rows of a word predict it: its score among all rises with its row along hidden
    with torch.no_grad():
        hidden, before = torch.randn(1, 16), one.embeddings()[7].clone()
        target = torch.tensor([7])
        likely = one.head.log_prob(hidden)[0, 7]
        rows = one.embeddings().clone()
        rows[7] += hidden[0]
        tied_rows(one.head, rows)
        assert one.head.log_prob(hidden)[0, 7] > likely + 1
        torch.testing.assert_close(one.model.words(target)[0], before + hidden[0])


@pytest.mark.parametrize(
    ("output", "setup", "lacking"),
    [
        ("softmax tied", {"embedding": 16}, "the word lstm"),
        ("softmax lstm tied", {}, "embeddings of width 16, that of the output, got 8"),
        ("softmax lstm tied classes=20", {"embedding": 16}, "all words as classes"),
    ],
)
def test_what_cannot_be_tied_is_told_what_can(output, setup, lacking):
    with pytest.raises(LabError, match=f"cannot be tied: that needs {lacking}"):
        run_of(output, **setup)
