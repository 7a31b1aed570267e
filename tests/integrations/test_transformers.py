"""A causal language model with an output layer of ours is the model with a dense one.

Longer than 300 lines, since all of it is about one function.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from _causal_models import (
    ARCHITECTURES,
    F64,
    HEADS,
    N,
    V,
    batch,
    gpt2,
    near,
    nll,
    states,
    taylor_log_prob,
    with_head,
)

from softsphere import FactoredSphericalLoss, LinearSphericalLoss
from softsphere.integrations.transformers import replace_lm_head

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

pytestmark = [
    pytest.mark.once("the models are made by transformers, and the heads have their own tests"),
    pytest.mark.filterwarnings("ignore"),
]

LR = 0.05


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_trains_and_scores_as_with_a_dense_head(name):
    make, tied = ARCHITECTURES[name]
    dense, model = make(), make()
    assert replace_lm_head(model) is model
    assert type(model).__name__ == type(dense).__name__ and isinstance(model, type(dense))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    sgds = [torch.optim.SGD(x.parameters(), LR) for x in (dense, model)]
    for k in range(3):
        given, items = batch(k), (None, 7, torch.tensor(9))[k]
        logits = dense(given["input_ids"]).logits
        outputs = model(**given, num_items_in_batch=items)
        loss = nll(taylor_log_prob(logits), given["labels"], items)
        near(outputs.loss, loss)
        assert outputs.logits is None
        for sgd, each in zip(sgds, (loss, outputs.loss), strict=True):
            sgd.zero_grad()
            each.backward()
            sgd.step()
    near(states(model), states(dense))
    want = taylor_log_prob(dense.eval()(given["input_ids"]).logits)
    assert model.train()(given["input_ids"]).logits.requires_grad
    outputs = model.eval()(**given)
    near(outputs.logits, want)
    near(outputs.loss, nll(want, given["labels"]))


@pytest.mark.parametrize("kind", HEADS)
def test_generate_has_the_log_probabilities_of_the_model(kind):
    model = with_head(kind).eval()
    tokens = batch()["input_ids"][:, :3]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
    told = {"return_dict_in_generate": True, "output_logits": True}
    seen = model.generate(tokens, do_sample=False, **options, **told)
    assert seen.sequences.shape == (2, 7)
    with torch.no_grad():
        hidden = model.transformer(seen.sequences).last_hidden_state[:, 2:-1]
        want = model.lm_head.log_prob(hidden)
    torch.testing.assert_close(torch.stack(seen.logits, 1), want.float(), rtol=1e-5, atol=1e-6)
    near(want.exp().sum(-1), torch.ones(2, 4).double())
    torch.manual_seed(0)
    sampled = model.generate(tokens[:1].expand(400, 3), do_sample=True, top_k=0, **options)
    shares = torch.bincount(sampled[:, 3], minlength=V) / 400
    p = want[0, 0].exp()
    p[0] = 0  # min_new_tokens forbids the end of a text
    # four standard deviations of a share of 400
    assert ((shares - p / p.sum()).abs() <= 4 * (p * (1 - p) / 400).sqrt() + 0.01).all()


@pytest.mark.parametrize("kind", ["linear", "clustered", "factored"])
def test_trainer_with_accumulation_clipping_and_resume(kind, tmp_path):
    """The steps are those of a loss of all log-probabilities, which a call without labels returns.

    That of a factored layer is computed by a dense one with the same weight.
    """
    data = [{k: v[0] for k, v in batch(seed, 1).items()} for seed in range(12)]
    by_logits = {
        "compute_loss_func": lambda outputs, labels, num_items_in_batch: nll(
            outputs.logits, labels, num_items_in_batch
        )
    }

    def run(folder, model, steps=3, resume=None, **options):
        arguments = transformers.TrainingArguments(
            str(tmp_path / folder),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=steps,
            max_grad_norm=0.3,
            save_steps=2,
            save_strategy="steps",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
            seed=3,
        )
        sgd = torch.optim.SGD(model.parameters(), 0.5)
        rates = torch.optim.lr_scheduler.LambdaLR(sgd, lambda k: 1 / (1 + k))
        trainer = transformers.Trainer(
            model, arguments, train_dataset=data, optimizers=(sgd, rates), **options
        )
        trainer.train(resume_from_checkpoint=resume)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return states(model), losses

    model = with_head(kind)
    if kind == "factored":
        model = replace_lm_head(gpt2(), FactoredSphericalLoss(16, V, **F64))
        twin = LinearSphericalLoss(16, V, **F64)
        twin.load_state_dict(model.lm_head.state_dict())
        other = replace_lm_head(gpt2(), twin)
    else:
        other = with_head(kind)
    start = copy.deepcopy(model)
    got, losses = run("own", model)
    want, wanted = run("dense", other, **by_logits)
    near(got, want)
    assert losses == pytest.approx(wanted, rel=1e-4)
    again, _ = run("own", start, resume=str(tmp_path / "own" / "checkpoint-2"))
    near(again, got)


def test_trainer_evaluates_and_smooths_labels(tmp_path):
    """Its label smoother sees log-probabilities, and so computes the dense loss."""
    data = [{k: v[0] for k, v in batch(seed, 1).items()} for seed in range(2)]
    model = with_head("linear")
    arguments = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, label_smoothing_factor=0.1
    )
    found = transformers.Trainer(model, arguments, eval_dataset=data).predict(data)
    log_prob = torch.as_tensor(found.predictions)
    assert log_prob.shape == (2, N, V)
    near(log_prob.exp().sum(-1), torch.ones(2, N).double())
    labels = torch.stack([x["labels"] for x in data])
    uniform = [-log_prob[i, j].mean() for i in range(2) for j in range(N - 1)]
    counted = [(labels[i, j + 1] != -100).item() for i in range(2) for j in range(N - 1)]
    spread = torch.stack([x for x, real in zip(uniform, counted, strict=True) if real]).mean()
    want = 0.9 * nll(log_prob, labels) + 0.1 * spread
    assert found.metrics["test_loss"] == pytest.approx(want.item(), rel=1e-5)


def test_adam_is_refused_for_a_factored_head(tmp_path):
    model = with_head("factored")
    arguments = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=1
    )
    data = [{k: v[0] for k, v in batch(0, 1).items()}] * 8
    before = states(model)
    with pytest.raises(TypeError, match="FactoredSGD"):
        transformers.Trainer(model, arguments, train_dataset=data).train()
    near(states(model), before)


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Phi"])
def test_tokens_are_added_and_removed(name):
    make, tied = ARCHITECTURES[name]
    model, dense = replace_lm_head(make()), make()
    for size in (V + 5, V - 3):
        for each in (model, dense):
            torch.manual_seed(0)
            each.resize_token_embeddings(size)
        head = model.lm_head
        assert head.num_classes == model.config.vocab_size == size
        assert (head.weight is model.get_input_embeddings().weight) == tied
        near(states(model), states(dense))
    tokens = batch()["input_ids"] % (V - 3)
    loss = model(tokens, labels=tokens).loss
    near(loss, nll(model.eval()(tokens).logits, tokens))
    assert model.resize_token_embeddings() is model.get_input_embeddings()


@pytest.mark.parametrize("kind", HEADS)
def test_tokens_of_other_heads_are_not_resized(kind):
    model = with_head(kind)
    before = states(model)
    with pytest.raises((TypeError, ValueError), match="before replace_lm_head"):
        model.resize_token_embeddings(V + 1)
    assert states(model).keys() == before.keys() and model.config.vocab_size == V
    model(**batch()).loss.backward()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_models_with_the_head(way):
    model = replace_lm_head(gpt2(tied=True))
    other = way(model)
    assert other.lm_head.weight is other.transformer.wte.weight is not model.lm_head.weight
    near(other(**batch()).loss, model(**batch()).loss)
    assert other(**batch()).logits is None


def test_gradient_checkpointing_changes_nothing():
    grads = []
    for checkpointing in (False, True):
        model = replace_lm_head(gpt2(tied=True))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch()).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    near(grads[1], grads[0])


@pytest.mark.parametrize("kind", ["linear", "clustered", "autocast", "autocast, factored"])
def test_bfloat16(kind):
    """The loss is in float32, and as near as the hidden states and weights allow."""
    autocast = kind.startswith("autocast")
    model = with_head("factored" if "factored" in kind else kind.replace("autocast", "linear"))
    model = model.float() if autocast else model.bfloat16()
    exact = copy.deepcopy(model).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model(**batch(), num_items_in_batch=3)
        scores = model.eval()(**batch()).logits
    want = exact(**batch(), num_items_in_batch=3)
    assert outputs.loss.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(outputs.loss, want.loss, rtol=0.02, atol=0)
    outputs.loss.backward()
    want.loss.backward()
    for p, q in zip(model.transformer.parameters(), exact.transformer.parameters(), strict=True):
        assert (p.grad.float() - q.grad).norm() <= 0.1 * q.grad.norm() + 1e-3
