"""Criteria and rankings. Oracles: the formulas as loops in float64; finite differences of the loss for Taylor."""

import warnings
from collections.abc import Callable

import pytest
import torch

from atp.criteria import scores, statistics
from atp.criteria.ranking import default_protect, rank, standardised, starting_logits, z_scores
from atp.criteria.statistics import curvatures, input_moments
from atp.criteria.surgeon import refitted, removal_costs
from atp.layers import Attachment, attach
from atp.structure.budget import project
from atp.structure.building import build_space
from atp.structure.discovery import discover
from tests import families, tiny

IDS = torch.randint(2, 384, (3, 10), generator=torch.Generator().manual_seed(0))


def parts(name: str) -> tuple:
    model = tiny.model().eval()
    space = build_space(discover(model), name, round_to=1)
    modules = {linear.path: model.get_submodule(linear.path) for linear in space.linears}
    return model, space, modules


def added_up(model: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model's loss on rows as `IDS`, added up over labels, of which the first of a row is not predicted."""
    return lambda ids: ids[:, 1:].numel() * model(input_ids=ids, labels=ids).loss


def test_activation_weights_each_column_by_its_inputs_norm() -> None:
    model, space, modules = parts("width")
    inputs = {}
    writer = modules["model.layers.1.mlp.down_proj"]
    writer.register_forward_pre_hook(lambda m, args: inputs.update(x=args[0].double()))
    got = scores.activation(space, modules, lambda ids: model(input_ids=ids), [IDS])
    x = inputs["x"].flatten(0, 1)
    for channel in (0, 7, 47):
        wanted = writer.weight[:, channel].double().abs().sum() * x[:, channel].norm()
        assert got["1.mlp"][channel].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_flap_weights_squares_by_the_variance_of_inputs() -> None:
    model, space, modules = parts("width")
    inputs = []
    writer = modules["model.layers.1.mlp.down_proj"]
    writer.register_forward_pre_hook(lambda m, args: inputs.append(args[0].double().flatten(0, 1)))
    got = scores.flap(space, modules, lambda ids: model(input_ids=ids), [IDS, IDS + 1])
    variance = torch.cat(inputs).var(0, correction=0)
    wanted = writer.weight.double().square().sum(0) * variance
    torch.testing.assert_close(got["1.mlp"].double(), wanted.detach(), rtol=1e-4, atol=0.0)


def test_disp_scores_rows_of_writers_and_columns_of_readers() -> None:
    _, space, modules = parts("disp")
    got = scores.magnitude(space, modules)
    reader = sum(modules[f"model.layers.2.mlp.{n}_proj"].weight.abs().sum(0) for n in ("gate", "up"))
    torch.testing.assert_close(got["2.mlp_in"], reader.detach())
    writer = modules["model.layers.2.self_attn.o_proj"].weight.abs().sum(1)
    torch.testing.assert_close(got["2.attention_out"], writer.detach())


def test_taylor_is_the_slope_of_the_loss() -> None:
    model, space, _ = parts("width")
    attachment = attach(model, space)

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss

    got = scores.taylor(space, attachment.masks, loss, [IDS])
    for name, group in (("0.kv", 1), ("3.mlp", 5)):
        ends = []
        for value in (0.95, 1.05):
            attachment.masks[name][group] = value
            ends.append(loss(IDS).item())
        attachment.masks[name][group] = 1.0
        slope = abs(ends[1] - ends[0]) / 0.1
        assert got[name][group].item() == pytest.approx(slope, rel=2e-2)


def test_taylor_survives_a_gradient_that_float16_rounds_to_nothing() -> None:
    model, space, _ = parts("width")
    attachment = attach(model, space)

    def loss(_: object) -> torch.Tensor:
        return sum((m * torch.full((4096, 1), 2e-4)).half().float().mean() * 1e-3 for m in attachment.masks.values())

    got = scores.taylor(space, attachment.masks, loss, [IDS])
    for s in space.sets:
        torch.testing.assert_close(got[s.name], torch.full((s.size,), 2e-7 / s.size), rtol=5e-2, atol=0.0)


@pytest.mark.parametrize("name", ["width", "values", "disp"])
def test_surgeon_costs_are_those_of_removal_with_refitting(name: str) -> None:
    """Oracle: least squares in float64 for every candidate, weighted by the loss's slope at the outputs."""
    model, space, modules = parts(name)
    attachment = attach(model, space)

    loss = added_up(model)
    group_set, together = {
        "width": ("1.kv", ["o_proj"]),
        "values": ("1.value", ["o_proj"]),
        "disp": ("1.mlp_in", ["gate_proj", "up_proj"]),
    }[name]
    layers = [modules[f"model.layers.1.{'self_attn' if n == 'o_proj' else 'mlp'}.{n}"] for n in together]
    inputs, slopes = [], {n: [] for n in together}
    handles = []
    for n, layer in zip(together, layers, strict=True):

        def watch(_module: object, args: tuple, output: torch.Tensor, n: str = n) -> None:
            inputs.append(args[0].detach().double().flatten(0, 1))
            output.register_hook(lambda d: slopes[n].append(d.double().flatten(0, 1)))

        handles.append(layer.register_forward_hook(watch))
    attachment.require_gradients(True)
    loss(IDS).backward()
    attachment.require_gradients(False)
    for handle in handles:
        handle.remove()
    got = scores.surgeon(space, modules, attachment.masks, loss, [IDS])
    assert got.keys() == {s.name for s in space.sets}
    x = inputs[0]
    gram = x.T @ x / len(x)
    gram = gram + 0.1 * gram.diagonal().median() * torch.eye(len(gram), dtype=torch.float64)
    heads = torch.arange(32) // 16  # KV heads of two query heads of 8 dimensions
    owner = {"width": heads, "values": heads * 8 + torch.arange(32) % 8}.get(name, torch.arange(32))
    first = got[group_set].argmin().item()
    costs = []
    for group in range(int(owner.max()) + 1):
        gone, kept = (owner == group).nonzero().flatten(), (owner != group).nonzero().flatten()
        cost = 0.0
        for n, layer in zip(together, layers, strict=True):
            weight = layer.weight.detach().double()
            change = torch.zeros_like(weight)
            change[:, kept] = weight[:, gone] @ torch.linalg.solve(gram[kept][:, kept], gram[kept][:, gone]).T
            change[:, gone] = -weight[:, gone]
            slope = slopes[n][0].T @ slopes[n][0] / len(x)
            cost += torch.trace(slope @ change @ gram @ change.T).item() / 2
        costs.append(cost)
    assert costs.index(min(costs)) == first
    assert got[group_set][first].item() == pytest.approx(min(costs), rel=1e-3)


def test_costs_follow_the_order_in_which_groups_go() -> None:
    """Oracle: the greedy order by brute force, every candidate refitted from scratch in float64."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    x = torch.randn(400, 24, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(8, 24, generator=generator, dtype=torch.float64)
    gram = x.T @ x / len(x)
    damped = gram + 0.1 * gram.diagonal().median() * torch.eye(24, dtype=torch.float64)
    owner = torch.arange(24) // 3
    left, order = list(range(8)), []

    def cost(group: int) -> float:
        kept = torch.isin(owner, torch.tensor([g for g in left if g != group])).nonzero().flatten()
        change = -weight.clone()
        if len(kept):
            change[:, kept] += torch.linalg.solve(damped[kept][:, kept], (weight @ damped)[:, kept].T).T
        return torch.trace(change @ damped @ change.T).item()

    while left:
        order.append(min(left, key=cost))
        left.remove(order[-1])
    costs = removal_costs(weight.float(), gram.float(), owner)
    assert costs.argsort(stable=True).tolist() == order


def test_refitting_is_the_best_that_the_kept_columns_can_do() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    weight, keep = torch.randn(5, 12, generator=generator), torch.arange(12) % 3 > 0
    fitted = refitted(weight, x.T @ x / len(x), keep)
    assert torch.equal(fitted[:, ~keep], weight[:, ~keep])

    def error(columns: torch.Tensor) -> float:
        return (x[:, keep] @ columns.T - x @ weight.T).square().sum().item()

    best = torch.linalg.lstsq(x[:, keep], x @ weight.T).solution.T
    assert error(best) <= error(fitted[:, keep]) < error(best) * 1.05
    assert error(fitted[:, keep]) < 0.9 * error(weight[:, keep])


def test_an_input_that_holds_far_more_than_others_changes_nothing_for_them() -> None:
    """As at an attention sink. Oracle: costs and refit of the same layer without that input."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    huge = 1e4 * torch.randn(200, 1, generator=generator)
    weight, keep = torch.randn(5, 25, generator=generator), torch.arange(25) % 3 != 1
    x = torch.cat([x, huge - x @ torch.linalg.lstsq(x, huge).solution], 1)  # tells nothing of the others
    gram = x.T @ x / len(x)
    costs, fitted = removal_costs(weight, gram, torch.arange(25)), refitted(weight, gram, keep)
    assert costs.argmax() == 24
    alone = removal_costs(weight[:, :24], gram[:24, :24], torch.arange(24))
    assert families.relative_error(costs[:24], alone) <= 0.02
    assert families.relative_error(fitted[:, :24], refitted(weight[:, :24], gram[:24, :24], keep[:24])) <= 0.02


def test_inputs_that_are_never_there_go_first() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 12, generator=generator)
    x = torch.randn(200, 12, generator=generator) * (torch.arange(12) < 3)
    costs = removal_costs(weight, x.T @ x / len(x), torch.arange(12))
    assert costs[3:].max() < costs[:3].min()
    nothing = torch.zeros(12, 12)
    assert removal_costs(weight, nothing, torch.arange(12)).isfinite().all()
    assert refitted(weight, nothing, torch.arange(12) < 6).isfinite().all()


def test_curvatures_do_not_depend_on_how_many_fit_at_a_time() -> None:
    model, space, modules = parts("width")
    attachment = attach(model, space)
    attachment.require_gradients(True)
    layers = {path: modules[path] for path in modules if path.endswith(("o_proj", "down_proj"))}

    def gather(budget: int) -> dict:
        leaves = list(attachment.masks.values())
        return dict(curvatures(layers, added_up(model), leaves, [IDS, IDS + 1], budget))

    whole, parted = gather(8 << 30), gather(1)
    assert list(whole) == list(parted) == list(layers)
    for path, found in whole.items():
        torch.testing.assert_close(found.inputs, parted[path].inputs)
        torch.testing.assert_close(found.gradients, parted[path].gradients)


def test_curvatures_are_the_same_under_checkpointing() -> None:
    """There, most layers run twice for each backward pass."""
    model, space, modules = parts("width")
    attachment = attach(model, space)
    attachment.require_gradients(True)
    layers = {path: modules[path] for path in modules if path.endswith(("o_proj", "down_proj"))}
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of the only name in 5.17
                model.train().gradient_checkpointing_enable({"use_reentrant": False})
        leaves = list(attachment.masks.values())
        found.append(dict(curvatures(layers, added_up(model), leaves, [IDS, IDS + 1])))
    for path, plain in found[0].items():
        torch.testing.assert_close(found[1][path].inputs, plain.inputs)
        torch.testing.assert_close(found[1][path].gradients, plain.gradients)


def test_padding_is_no_data() -> None:
    model, space, modules = parts("width")
    attachment = attach(model, space)
    attachment.require_gradients(True)
    layers = {path: modules[path] for path in modules if path.endswith(("o_proj", "down_proj"))}
    rows = [IDS[i % 3 : i % 3 + 1, : 4 + i] for i in range(6)]

    def loss(batch: dict) -> torch.Tensor:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return model(**batch, labels=labels).loss * (labels[:, 1:] != -100).sum()

    found = []
    for batches in ([families.padded([row]) for row in rows], [families.padded(rows)]):
        leaves = list(attachment.masks.values())
        moments = input_moments(layers, lambda batch: model(**batch), batches)
        found.append((dict(curvatures(layers, loss, leaves, batches)), moments))
    (alone, alone_moments), (together, together_moments) = found
    for path in layers:
        assert together_moments[path].tokens == sum(row.numel() for row in rows)
        torch.testing.assert_close(together_moments[path].total, alone_moments[path].total, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together[path].inputs, alone[path].inputs, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(together[path].gradients, alone[path].gradients, rtol=1e-4, atol=1e-6)


def test_second_order_taylor_follows_the_expansion() -> None:
    model, space, _ = parts("width")
    attachment = attach(model, space)

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss

    batches = [IDS, IDS + 1, IDS + 2]
    got = scores.taylor(space, attachment.masks, loss, batches, order=2)
    leaf = attachment.masks["1.mlp"].requires_grad_(True)
    gradients = torch.stack([torch.autograd.grad(loss(ids), leaf)[0].double() for ids in batches])
    wanted = (gradients.mean(0) - gradients.square().mean(0) / 2).abs()
    torch.testing.assert_close(got["1.mlp"].double(), wanted, rtol=1e-4, atol=1e-9)


def test_standard_ranking_compares_z_scores_over_blocks() -> None:
    _, space, modules = parts("width")
    raw = scores.magnitude(space, modules)
    raw["1.mlp"] = raw["1.mlp"] * 100.0 + 7.0  # another block's scale must not matter
    plain = rank(standardised(scores.magnitude(space, modules), space), space, "standard", (0, 0))
    scaled = rank(standardised(raw, space), space, "standard", (0, 0))
    torch.testing.assert_close(plain, scaled, rtol=0.0, atol=0.01)
    z = {k: (v - v.mean()) / v.std(correction=0) for k, v in raw.items()}
    (a, b), (c, d) = ("0.mlp", 3), ("2.kv", 1)
    assert (z[a][b] > z[c][d]) == (scaled[a][b] > scaled[c][d])


def test_a_tilt_favours_late_blocks_by_the_factor_it_says() -> None:
    _, space, modules = parts("width")
    raw = scores.magnitude(space, modules)
    by_hand = {name: value * torch.e ** (0.7 * (2 * int(name[0]) / 3 - 1)) for name, value in raw.items()}
    tilted, wanted = rank(raw, space, "global", (0, 0), tilt=0.7), rank(by_hand, space, "global", (0, 0))
    assert all(torch.equal(tilted[name], wanted[name]) for name in raw)
    kept = [project(ranked, space, 0.4) for ranked in (rank(raw, space, "global", (0, 0)), tilted)]
    assert kept[0]["3.mlp"].sum() < kept[1]["3.mlp"].sum()
    assert kept[0]["0.mlp"].sum() > kept[1]["0.mlp"].sum()


@pytest.mark.parametrize(("name", "kind"), [("width", "kv"), ("values", "value")])
def test_attention_is_favoured_by_the_factor_it_says(name: str, kind: str) -> None:
    _, space, modules = parts(name)
    raw = scores.magnitude(space, modules)
    by_hand = {key: value * (torch.e**0.7 if key.endswith(kind) else 1.0) for key, value in raw.items()}
    favoured, wanted = rank(raw, space, "global", (0, 0), attention=0.7), rank(by_hand, space, "global", (0, 0))
    assert all(torch.equal(favoured[key], wanted[key]) for key in raw)
    less, more = (rank(raw, space, "global", (0, 0), attention=favour) for favour in (-1.5, 1.5))
    less, more = (space.kept_share(project(ranked, space, 0.4)) for ranked in (less, more))
    assert less[kind] < more[kind]
    assert less["mlp"] > more["mlp"]


def test_a_floor_leaves_every_set_its_best_groups_and_changes_no_order() -> None:
    _, space, modules = parts("width")
    raw = {name: value * 100.0 ** int(name[0]) for name, value in scores.magnitude(space, modules).items()}
    without = project(rank(raw, space, "global", (0, 0)), space, 0.5)
    ranked = rank(raw, space, "global", (0, 0), floor=0.25)
    masks = project(ranked, space, 0.5)
    assert without["0.mlp"].sum() < 0.25 * len(without["0.mlp"])
    assert all(masks[s.name].sum() >= round(0.25 * s.size) for s in space.sets)
    for name, value in raw.items():
        assert torch.equal(value.argsort(stable=True), ranked[name].argsort(stable=True)), name
    plain = rank(raw, space, "standard", (0, 0))
    assert all(torch.equal(v, plain[k]) for k, v in rank(raw, space, "standard", (0, 0), floor=0.25).items())


def test_block_ranking_prunes_every_block_alike_and_spares_protected_ones() -> None:
    _, space, modules = parts("width")
    raw = scores.magnitude(space, modules)
    masks = project(rank(raw, space, "block", (1, 1)), space, 0.25)
    kept = {s.name: masks[s.name].mean().item() for s in space.sets if s.kind == "mlp"}
    assert kept["0.mlp"] == kept["3.mlp"] == 1.0
    assert abs(kept["1.mlp"] - kept["2.mlp"]) <= 1 / 48
    best = raw["1.mlp"].topk(int(masks["1.mlp"].sum())).indices
    assert masks["1.mlp"][best].all(), "each block keeps its own best"
    assert default_protect(30) == (3, 1)


@pytest.mark.parametrize(("sparsity", "left"), [(0.2, 3), (0.4, 2), (0.5, 2), (0.7, 1)])
def test_block_ranking_takes_no_larger_share_of_few_large_groups(sparsity, left) -> None:
    """As the authors of Wanda's structured form, FLAP and LLM-Pruner round."""
    sizes = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 256}
    space = build_space(discover(tiny.model(**sizes)), "width", round_to=1)
    masks = project(rank(scores.random(space, 0), space, "block", (0, 0)), space, sparsity)
    assert [masks[f"{block}.kv"].sum().item() for block in range(4)] == [left] * 4


def test_where_all_are_alike_none_stands_out() -> None:
    """Rounding would: the mean of 48 times 0.1 is not 0.1."""
    for value, size in ((0.1, 48), (1.7e-3, 576), (0.0, 3)):
        assert not z_scores(torch.full((size,), value)).any()
    assert z_scores(torch.tensor([1.0, 1.0, 1.0 + 1e-3]))[2] == pytest.approx(2**0.5, rel=1e-3)


def test_standardised_features_are_averaged_over_what_a_group_owns() -> None:
    """FLAP, by hand: z-scores of one layer's features, of attention those of squares."""
    model, space, modules = parts("width")
    inputs: dict[str, list[torch.Tensor]] = {"self_attn.o_proj": [], "mlp.down_proj": []}
    for name, seen in inputs.items():
        layer = modules[f"model.layers.1.{name}"]
        layer.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0].double().flatten(0, 1)))
    got = scores.flap(space, modules, lambda ids: model(input_ids=ids), [IDS, IDS + 1], standard=True)
    for name, found, power in (("self_attn.o_proj", got["1.kv"], 2), ("mlp.down_proj", got["1.mlp"], 1)):
        features = modules[f"model.layers.1.{name}"].weight.double().square().sum(0)
        features = (features * torch.cat(inputs[name]).var(0, correction=0)) ** power
        z = (features - features.mean()) / features.std(correction=0)
        torch.testing.assert_close(found.double(), z.view(len(found), -1).mean(1).detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("how", ["block", "global", "standard"])
@pytest.mark.parametrize("name", ["width", "values", "disp"])
def test_starting_logits_reproduce_the_decision(name: str, how: str) -> None:
    _, space, modules = parts(name)
    ranked = rank(scores.magnitude(space, modules), space, how, (1, 1))
    decision = project(ranked, space, 0.4)
    logits = starting_logits(ranked, decision, 1.5)
    again = project(logits, space, 0.4)
    assert all(torch.equal(decision[k], again[k]) for k in decision)
    positive = sum((z > 0).sum().item() for z in logits.values())
    assert abs(positive - sum(m.sum().item() for m in decision.values())) <= len(space.sets), "ties at the edge"


def _seen(model: torch.nn.Module, attachment: Attachment, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer reads, and the summed loss's gradient at what it writes, `(tokens, features)`, float64."""
    found = {}

    def watch(_module: object, args: tuple, output: torch.Tensor) -> None:
        found["x"] = args[0].detach().double().flatten(0, 1)
        output.register_hook(lambda d: found.update(d=d.double().flatten(0, 1)))

    handle = attachment.modules[path].register_forward_hook(watch)
    attachment.require_gradients(True)
    added_up(model)(IDS).backward()
    attachment.require_gradients(False)
    handle.remove()
    return found["x"], found["d"]


def test_surgeon_weighs_a_whole_attention_by_all_it_writes() -> None:
    model, space, modules = parts("depth")
    attachment = attach(model, space)
    path = "model.layers.2.self_attn.o_proj"
    x, d = _seen(model, attachment, path)
    y = x @ modules[path].weight.detach().double().T
    wanted = ((y.T @ y / len(y)) * (d.T @ d / len(d))).sum() / 2
    got = scores.surgeon(space, modules, attachment.masks, added_up(model), [IDS])
    assert got.keys() == {s.name for s in space.sets}
    assert got["2.whole_attention"].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_surgeon_weighs_a_dimension_of_the_stream_by_what_every_reader_loses() -> None:
    model, space, modules = parts("hidden")
    attachment, wanted = attach(model, space), torch.zeros(32, dtype=torch.float64)
    for linear in space.linears:
        if linear.cols is not None:
            x, d = _seen(model, attachment, linear.path)
            weight = modules[linear.path].weight.detach().double()
            slopes = d.T @ d / len(d)
            wanted += x.square().mean(0) * torch.einsum("oi,op,pi->i", weight, slopes, weight) / 2
    got = scores.surgeon(space, modules, attachment.masks, added_up(model), [IDS])
    torch.testing.assert_close(got["hidden"].double(), wanted, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["hidden", "depth", "width+hidden+depth"])
def test_formulas_score_every_group_of_every_space(name: str) -> None:
    model, space, modules = parts(name)
    attachment = attach(model, space)

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss

    for found in (
        scores.magnitude(space, modules),
        scores.activation(space, modules, loss, [IDS]),
        scores.flap(space, modules, loss, [IDS]),
        scores.taylor(space, attachment.masks, loss, [IDS]),
    ):
        assert {k: (len(v), bool((v > 0).all())) for k, v in found.items()} == {
            s.name: (s.size, True) for s in space.sets
        }


def test_whole_halves_are_not_spared_by_a_floor() -> None:
    """With a floor, the best group of a set of one would be all of it."""
    _, space, _ = parts("width+depth")
    ranked = rank({s.name: torch.ones(s.size) for s in space.sets}, space, "global", (0, 0), floor=0.9)
    assert all((ranked[s.name] < 1).all() for s in space.sets if s.size == 1)
    assert any((ranked[s.name] > 1).any() for s in space.sets if s.size > 1)


@pytest.mark.parametrize("how", ["block", "standard", "global"])
@pytest.mark.parametrize("name", ["depth", "width+depth"])
def test_whole_halves_are_ranked_by_their_scores(how: str, name: str) -> None:
    """In a set of one there is nothing to compare with: they are compared with one another."""
    _, space, _ = parts(name)
    halves = [s.name for s in space.sets if s.size == 1]
    found = {s.name: torch.full((s.size,), 1e6) for s in space.sets}
    worth = dict(
        zip(halves, torch.randperm(len(halves), generator=torch.Generator().manual_seed(3)) + 1.0, strict=True)
    )
    held = dict(zip((s.name for s in space.sets), space.group_parameters.tolist(), strict=True))
    found |= {half: (worth[half] * held[half])[None] for half in halves}
    ranked = rank(standardised(found, space) if how == "standard" else found, space, how, (0, 0))
    assert sorted(halves, key=lambda half: ranked[half].item()) == sorted(halves, key=lambda half: worth[half].item())


def test_on_a_gpu_statistics_may_take_a_third_of_what_is_free_or_held_and_unused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (30, 900))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 230)
    assert statistics._spare_bytes(torch.device("cuda")) == 100
