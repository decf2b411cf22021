"""Alerts on made-up histories: each fires on the one that it is for, and on no other."""

import dataclasses

import pytest

from atp.training.alerts import Plan, Seen, alerts

PLAN = Plan(
    start_step=20,
    freeze_step=120,
    sparsity=0.4,
    sizes={"kv": [4] * 6, "mlp": [48] * 6},
    blocks={"kv": list(range(6)), "mlp": list(range(6))},
)
UNEVEN = {"kv": [4, 2, 3, 2, 2, 4], "mlp": [40, 20, 28, 30, 31, 48]}
HEALTHY = {"loss": 2.0, "sparsity": 0.4, "churn": 0.001, "entropy": 0.4, "frozen": 0.0}


def seen(step, kept=UNEVEN, **figures):
    return Seen(step, HEALTHY | figures, kept)


def evaluated(step, eval_loss, loss):
    return [Seen(step, {"eval_loss": eval_loss}), seen(step + 1, loss=loss)]


def history(eval_losses, losses, first=0):
    steps = range(first, first + 10 * len(losses), 10)
    entries = [
        entry for step, *both in zip(steps, eval_losses, losses, strict=True) for entry in evaluated(step, *both)
    ]
    return entries[:-1]


NORMAL = {
    "before pruning": [seen(5, UNEVEN, entropy=0.0, sparsity=0.0)],
    "learning": [seen(40), seen(60, churn=0.2)],
    "near the freeze": [seen(110), seen(115)],
    "frozen": [seen(130, frozen=1.0, churn=0.0, entropy=0.0)],
    "held-out loss jumps where pruning begins": history([3.0, 2.8, 3.5, 3.4, 3.3, 3.2], [3.0, 2.7, 3.6, 3.3, 3.2, 3.1]),
    "held-out loss falls, from where pruning put it": history(
        [2.5, 2.4, 2.3, 3.4, 3.3, 3.2, 3.1], [3.0, 2.7, 2.5, 2.4, 2.3, 2.2, 2.1]
    ),
    "held-out loss a little worse": history([3.0, 3.02, 3.03, 3.01, 3.02], [3.0, 2.9, 2.8, 2.7, 2.6]),
    "tuned, and no worse for it": [seen(10, held_out_dense=3.0), seen(20), seen(30, held_out_dense=3.01)],
    "on budget late": [seen(50, sparsity=0.1)],
    "a head left, and a few channels": [
        seen(130, {"kv": [4, 1, 3, 2, 2, 4], "mlp": [40, 3, 28, 30, 4, 48]}, frozen=1.0)
    ],
}
BAD = {
    "not finite": [seen(30, grad_norm=float("nan"))],
    "budget": [seen(110, sparsity=0.2)],
    "churn": [seen(105, churn=0.05), seen(115, churn=0.03)],
    "empty": [seen(130, {"kv": [4, 0, 3, 2, 2, 4], "mlp": [40, 20, 28, 30, 2, 48]}, frozen=1.0)],
    "diverging": history([3.0, 2.8, 3.0, 3.1, 3.2], [3.0, 2.7, 2.5, 2.2, 2.0], first=30),
    "spoilt": [seen(10, held_out_dense=3.0), seen(20), seen(30, held_out_dense=3.1)],
    "collapse": [seen(60, entropy=1e-5)],
}


@pytest.mark.parametrize("name", NORMAL)
def test_a_normal_run_is_left_alone(name):
    entries = NORMAL[name]
    assert [alert for end in range(1, len(entries) + 1) for alert in alerts(PLAN, entries[:end])] == []


@pytest.mark.parametrize("name", BAD)
def test_what_goes_wrong_is_said_with_its_value(name):
    (alert,) = alerts(PLAN, BAD[name])
    assert alert.name == name
    assert alert.value is not None
    assert len(alert.message.splitlines()) == 1


def test_a_spoilt_model_is_no_news_where_it_was_not_measured():
    assert alerts(PLAN, [*BAD["spoilt"], seen(40)]) == []


def test_decisions_on_budget_may_not_be_just_what_is_asked():
    """With few large groups."""
    assert alerts(dataclasses.replace(PLAN, on_budget=True), BAD["budget"]) == []


def test_the_empty_halves_are_named():
    (alert,) = alerts(PLAN, BAD["empty"])
    assert "kv of block 1; mlp of block 4" in alert.message


def test_halves_that_are_switched_off_on_purpose_are_no_alert():
    plan = dataclasses.replace(
        PLAN, sizes=PLAN.sizes | {"whole_mlp": [1] * 6}, blocks=PLAN.blocks | {"whole_mlp": list(range(6))}
    )
    kept = {"kv": [4, 0, 3, 2, 2, 4], "mlp": [0] * 6, "whole_mlp": [0] * 6}
    assert alerts(plan, [seen(130, kept, frozen=1.0)]) == []


@pytest.mark.parametrize("share", [24, 48])
def test_blocks_that_are_all_alike(share):
    alike = {"kv": [2] * 6, "mlp": [share] * 6}
    found = [alert.name for alert in alerts(PLAN, [seen(110, alike)])]
    assert found == (["collapse"] if share < 48 else [])
    for changes in ({"uniform": True}, {"learned": False}):
        assert alerts(dataclasses.replace(PLAN, **changes), [seen(110, alike)]) == []
