"""Distillation. Oracles: the KL divergence by autograd between two plain models; the run done another way."""

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from atp.layers import attach
from atp.structure.building import build_space
from atp.structure.discovery import discover
from atp.structure.live import causal_lm
from atp.training import distillation
from atp.training.compensation import Compensation
from atp.training.distillation import Distillation
from tests import families, runs
from tests.export.cases import random_masks

IDS = families.tokens(rows=3, seed=0)
LABELS = IDS.clone()
LABELS[0, :5] = -100
LABELS[1] = -100


def student(family: str = "llama", how: str = "follow", compact: bool = True, **lora: object) -> tuple:
    """A model under a final decision, its adapters moved on since pruning began, and its distillation at weight 0.7."""
    model = families.with_lora(families.build(family), **lora).train()
    attachment = attach(model, build_space(discover(model), "width"))
    decision = random_masks(attachment.space, 0.3)
    compensation = Compensation(how, attachment, lambda ids: model(input_ids=ids), [IDS])
    made = Distillation(model, attachment, compensation, weight=0.7)
    made.begin_step(begins=True)
    compensation.apply(decision, attachment.space.full())
    attachment.set_masks(decision)
    if compact:
        assert attachment.compact()
    move(model)
    return model, made


def move(model: torch.nn.Module) -> None:
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=random)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    learned = LABELS[:, 1:] != -100
    p, q = (log_softmax(z[:, :-1][learned], -1) for z in (p, q))
    return kl_div(q, p, log_target=True, reduction="batchmean")


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "qwen3", "phi3"])
def test_gradient_is_that_of_task_and_divergence_from_the_model_before_pruning(family: str, monkeypatch) -> None:
    monkeypatch.setattr(distillation, "CHUNK", 7)
    model, made = student(family)
    loss = model(input_ids=IDS, labels=LABELS).loss
    loss.backward()
    found = gradients(model)
    made.remove()
    dense = families.with_lora(families.build(family)).eval()
    with torch.no_grad():
        p = dense(input_ids=IDS).logits
    output = model(input_ids=IDS, labels=LABELS)
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-6), "the loss that is seen is the task's"
    wanted_kl = divergence(p, output.logits)
    (output.loss + 0.7 * wanted_kl).backward()
    assert made.metrics() == {"teacher_kl": pytest.approx(wanted_kl.item(), rel=1e-4)}
    wanted = gradients(model)
    assert runs.worst(found, wanted) < 1e-4
    assert wanted_kl > 1e-3


@pytest.mark.parametrize("lora", [{"target_modules": ["down_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_a_head_that_is_tuned_is_the_teachers_as_it_was(lora: dict[str, object]) -> None:
    model, made = student(compact=False, **lora)
    output = model(input_ids=IDS, labels=LABELS)
    output.loss.backward()
    dense = families.with_lora(families.build("llama"), **lora).eval()
    with torch.no_grad():
        wanted = divergence(dense(input_ids=IDS).logits, output.logits)
    assert made.metrics() == {"teacher_kl": pytest.approx(wanted.item(), rel=1e-4)}
    assert wanted > 1e-3


def test_where_no_label_counts_nothing_is_taught() -> None:
    model, made = student()
    nothing = torch.full_like(IDS, -100)
    model(input_ids=IDS, labels=nothing, num_items_in_batch=torch.tensor(0)).logits.sum().mul(0.0).backward()
    assert made.metrics() == {"teacher_kl": 0.0}
    assert all(g.norm() == 0 for g in gradients(model).values())


def test_without_logits_the_same_gradient_comes_from_the_last_hidden_states() -> None:
    """As under TRL's fused head, which multiplies by the head's weight and never calls it."""
    found = []
    for called in (True, False):
        model, _ = student()
        lm = causal_lm(model)
        if called:
            logits = model(input_ids=IDS, labels=LABELS).logits
        else:
            backbone = lm.base_model
            lm.forward = lambda input_ids, backbone=backbone, **_: backbone(input_ids=input_ids).last_hidden_state
            logits = model(input_ids=IDS, labels=LABELS) @ lm.lm_head.weight.T
        logits.square().mean().backward()
        found.append(gradients(model))
    assert runs.worst(*found) < 1e-5


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("how", ["follow", "bias"])
def test_the_student_is_left_as_it_was(compact: bool, how: str) -> None:
    model, made = student(how=how, compact=compact)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    model(input_ids=IDS, labels=LABELS).loss.backward()
    assert made.metrics()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, logits)
    assert made.metrics() == {}, "nobody is taught without a backward pass"
    assert runs.same(before, dict(model.state_dict()))
    assert model.training
    made.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_nothing_is_added_before_pruning_begins_nor_to_passes_of_our_own() -> None:
    model = families.with_lora(families.build("llama")).train()
    attachment = attach(model, build_space(discover(model), "width"))
    made = Distillation(model, attachment, Compensation("none", attachment, lambda _: None, ()), 1.0)
    made.begin_step(begins=False)
    model(input_ids=IDS, labels=LABELS).loss.backward()
    assert made.metrics() == {}
    assert made.state() == {}
    made.begin_step(begins=True)
    with made.paused():
        model(input_ids=IDS, labels=LABELS).loss.backward()
    assert made.metrics() == {}
    model(input_ids=IDS, labels=LABELS).loss.backward()
    assert made.metrics() == {"teacher_kl": pytest.approx(0.0, abs=1e-6)}, "its own teacher"


def test_micro_batches_and_token_counts_scale_like_the_task_loss() -> None:
    model, made = student()
    made._weight = 3.0
    count = (LABELS[:, 1:] != -100).sum()
    model(input_ids=IDS, labels=LABELS).loss.backward()
    whole = gradients(model)
    made._micro_batches = 2
    (model(input_ids=IDS, labels=LABELS).loss / 2).backward()
    assert runs.worst({k: 2 * g for k, g in gradients(model).items()}, whole) < 1e-5
    model(input_ids=IDS, labels=LABELS, num_items_in_batch=4 * count).loss.backward()
    assert runs.worst({k: 4 * g for k, g in gradients(model).items()}, whole) < 1e-5
    made._ranks = 2
    (2 * model(input_ids=IDS, labels=LABELS, num_items_in_batch=4 * count).loss).backward()
    assert runs.worst({k: 2 * g for k, g in gradients(model).items()}, whole) < 1e-5
    made.begin_step(begins=True, loss_scale=8.0)
    made._ranks, made._micro_batches = 1, 1
    (8 * model(input_ids=IDS, labels=LABELS).loss).backward()
    assert runs.worst({k: g / 8 for k, g in gradients(model).items()}, whole) < 1e-5


def test_a_count_of_labels_that_were_not_seen_is_not_taken_for_one_of_all_tokens() -> None:
    model, _ = student()  # as the Trainer calls it where it smooths labels
    model(input_ids=IDS).logits.sum().mul(0.0).backward()
    wanted = gradients(model)
    model(input_ids=IDS, num_items_in_batch=4).logits.sum().mul(0.0).backward()
    assert runs.worst(gradients(model), wanted) < 1e-6
    assert max(g.abs().max() for g in wanted.values()) > 0


def test_a_step_gives_modules_their_own_modes_back() -> None:
    model, made = student()
    causal_lm(model).model.layers[1].eval()
    before = [module.training for module in model.modules()]
    made.begin_step(begins=False)
    model(input_ids=IDS, labels=LABELS).loss.backward()
    assert [module.training for module in model.modules()] == before
