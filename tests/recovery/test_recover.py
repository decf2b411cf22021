"""Recovery of exported models.

Oracles: `torch.linalg.lstsq` on inputs and targets taken with hooks; the same model untouched; an uninterrupted run.
"""

import copy

import pytest
import torch

from atp.errors import CalibrationError, CheckpointError, ConfigError, UnsupportedModelError
from atp.export import load
from atp.recovery import METHODS, RecoverySettings, Texts, recover, recovering, streams
from tests import families
from tests.export.cases import exported
from tests.recovery.interruption import cut_at_the_third

LENGTH = 12
TEXTS = Texts(*(families.tokens(rows, LENGTH, seed) for rows, seed in ((32, 5), (16, 6), (8, 7))))
CASES = [
    *(("llama", "width", method) for method in METHODS),
    *((family, "width", method) for family in ("gemma3", "olmo2", "phi3", "gpt_neox") for method in ("lr", "br+gp")),
    *(
        (family, space, "br+gp")
        for family, space in (("llama", "disp"), ("gemma3", "disp"), ("gemma3", "depth"), ("gemma3", "values"))
    ),
]


def settings(method="br", **changes):
    return RecoverySettings(**({"method": method, "batch_size": 8, "epochs": 3, "learning_rate": 3e-3} | changes))


def teacher_of(family):
    return families.with_lora(families.build(family)).merge_and_unload().eval()


def student_of(family, space="width"):
    return load(exported(family, space).folder).eval()


def pruned_from_block(family, first):
    """A student of which only blocks from `first` on are damaged."""
    student = teacher_of(family)
    with torch.no_grad():
        for block in student.model.layers[first:]:
            block.mlp.down_proj.weight[:, ::2] = 0.0
            block.self_attn.o_proj.weight[:, ::2] = 0.0
    return student


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def seen(layer, run):
    """What `layer` read and wrote while `run` ran, `(tokens, features)`."""
    found = []
    hook = layer.register_forward_hook(lambda _layer, args, output: found.append((args[0], output)))
    with torch.no_grad():
        run()
    hook.remove()
    return [torch.cat([each[side].flatten(0, -2) for each in found]) for side in (0, 1)]


@pytest.mark.parametrize("biases", [False, True])
def test_lr_is_the_least_squares_solution(tmp_path, biases):
    family = "llama_biases" if biases else "llama"
    teacher, student = teacher_of(family), student_of(family)
    old, ids = copy.deepcopy(student), TEXTS.calibration
    recover(teacher, student, TEXTS, settings("lr", ridge=1e-9, keep_best=False), tmp_path, quiet=True)

    def solution(x, target):
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1) if biases else x
        return torch.linalg.lstsq(x.double(), target.double()).solution.T

    def check(new, found):
        weight = torch.cat([new.weight, new.bias[:, None]], 1) if biases else new.weight
        assert families.relative_error(weight.double(), found) <= 1e-3

    own, theirs = (model.model.layers[0] for model in (old, teacher))
    x, _ = seen(own.self_attn.o_proj, lambda: old(input_ids=ids))
    _, target = seen(theirs.self_attn.o_proj, lambda: teacher(input_ids=ids))
    found = solution(x, target)
    check(student.model.layers[0].self_attn.o_proj, found)
    own.self_attn.load_state_dict(student.model.layers[0].self_attn.state_dict())
    entering, _ = seen(own.mlp, lambda: old(input_ids=ids))
    x, _ = seen(own.mlp.down_proj, lambda: old(input_ids=ids))
    with torch.no_grad():
        check(student.model.layers[0].mlp.down_proj, solution(x, theirs.mlp(entering)))


@pytest.mark.parametrize("train", ["all", "lora"])
@pytest.mark.parametrize("method", ["br", "br+gp+cr"])
def test_nothing_pruned_nothing_changed(tmp_path, method, train):
    teacher = teacher_of("llama")
    student = copy.deepcopy(teacher)
    recover(teacher, student, TEXTS, settings(method, train=train, keep_best=False), tmp_path, quiet=True)
    assert same(state(student), state(teacher))


@pytest.mark.parametrize("method", ["br", "br+gp+cr"])
def test_training_starts_from_what_lr_gives(tmp_path, method):
    at_rest = {"learning_rate": 1e-30, "batch_size": len(TEXTS.calibration)}  # in the one batch that lr takes
    found = {}
    for name, changes in (("lr", {}), (f"lr+{method}", at_rest), (f"lr+{method}", {})):
        work = tmp_path / str(len(found))
        work.mkdir()
        student = student_of("gemma3")
        chosen = settings(name, keep_best=False, **changes)
        outcome = recover(teacher_of("gemma3"), student, TEXTS, chosen, work, quiet=True)
        found[work.name] = state(student), outcome.blocks[-1].after["calibration"].relative
    (refitted, by_lr), (at_rest_too, _), (_, trained) = found.values()
    assert not same(refitted, state(student_of("gemma3")))
    assert same(at_rest_too, refitted)
    assert trained < 0.97 * by_lr


def test_training_that_loses_what_lr_gained_is_left_out(tmp_path):
    found = []
    for method in ("lr", "lr+br"):
        (tmp_path / method).mkdir()
        chosen = settings(method, learning_rate=0.05, batch_size=len(TEXTS.calibration))
        outcome = recover(teacher_of("gemma3"), student_of("gemma3"), TEXTS, chosen, tmp_path / method, quiet=True)
        found.append([block.after["held_out"].relative for block in outcome.blocks])
    assert all(trained <= refitted for refitted, trained in zip(*found, strict=True))


def test_gp_is_br_where_nothing_before_was_pruned(tmp_path):
    teacher, found = teacher_of("gemma3"), {}
    for method in ("br", "br+gp"):
        found[method] = pruned_from_block("gemma3", 1)
        (tmp_path / method).mkdir()
        chosen = settings(method, keep_best=False)
        recover(teacher, found[method], TEXTS, chosen, tmp_path / method, quiet=True)
    br, gp = ([state(block) for block in model.model.layers] for model in found.values())
    assert same(br[0], state(teacher.model.layers[0]))
    assert same(gp[1], br[1])
    assert not same(gp[2], br[2])


@pytest.mark.parametrize(("family", "space", "method"), CASES)
def test_the_pruned_stream_comes_nearer_on_text_that_was_not_fitted_to(tmp_path, family, space, method):
    found = recover(teacher_of(family), student_of(family, space), TEXTS, settings(method), tmp_path, quiet=True)
    assert len(found.blocks) == len(found.blocks[0].before) == 3 or len(found.blocks) == 2
    last = found.blocks[-1]
    assert all(last.after[text].relative < last.before[text].relative for text in ("calibration", "held_out"))
    assert any(block.kept for block in found.blocks)


def test_lora_is_merged_and_gone(tmp_path):
    student = student_of("llama")
    names = [name for name, _ in student.named_modules()]
    found = recover(teacher_of("llama"), student, TEXTS, settings(train="lora"), tmp_path, quiet=True)
    assert [name for name, _ in student.named_modules()] == names
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert found.blocks[-1].after["held_out"].relative < found.blocks[-1].before["held_out"].relative


def test_what_diverges_is_rolled_back_bitwise(tmp_path):
    student = student_of("llama")
    before = state(student)
    found = recover(teacher_of("llama"), student, TEXTS, settings(learning_rate=1e20), tmp_path, quiet=True)
    assert same(state(student), before)
    assert not found.kept
    assert not any(block.kept for block in found.blocks)
    assert found.after == found.before


def test_blocks_that_come_nearer_are_rolled_back_where_the_model_gets_no_better(tmp_path):
    teacher = teacher_of("llama")
    student = student_of("llama")
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    for _ in range(30):  # the student learns the held-out text, which its teacher does not know
        optimizer.zero_grad()
        student(input_ids=TEXTS.held_out, labels=TEXTS.held_out).loss.backward()
        optimizer.step()
    before = state(student)
    found = recover(teacher, student, TEXTS, settings("br+gp"), tmp_path, quiet=True)
    assert any(block.kept for block in found.blocks)
    assert found.after["held_out"].nll > found.before["held_out"].nll
    assert not found.kept
    assert same(state(student), before)


@pytest.mark.parametrize("method", ["lr", "br+gp", "br+cr", "lr+br+cr"])
def test_an_interrupted_recovery_ends_as_an_uninterrupted_one(tmp_path, monkeypatch, method):
    whole, cut = student_of("gemma3"), student_of("gemma3")
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    chosen = settings(method)
    expected = recover(teacher_of("gemma3"), whole, TEXTS, chosen, tmp_path / "whole", quiet=True)
    calls = cut_at_the_third(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        recover(teacher_of("gemma3"), cut, TEXTS, chosen, tmp_path / "cut", quiet=True)
    cut = student_of("gemma3")
    found = recover(teacher_of("gemma3"), cut, TEXTS, chosen, tmp_path / "cut", quiet=True)
    assert len(calls) == 4  # the third again, and no other twice
    assert same(state(cut), state(whole))
    assert [(b.before, b.after, b.kept) for b in found.blocks] == [(b.before, b.after, b.kept) for b in expected.blocks]


def test_streams_on_the_disk_are_those_in_memory(tmp_path, monkeypatch):
    students = [student_of("llama").bfloat16() for _ in range(2)]
    for student, limit in zip(students, (streams.IN_MEMORY, 0), strict=True):
        work = tmp_path / str(limit)
        work.mkdir()
        monkeypatch.setattr(streams, "IN_MEMORY", limit)
        recover(teacher_of("llama").bfloat16(), student, TEXTS, settings("br+gp"), work, quiet=True)
        assert not list(work.glob(".stream*"))
    assert same(*(state(student) for student in students))
    assert all(parameter.dtype == torch.bfloat16 for parameter in students[0].parameters())


@pytest.mark.parametrize("family", ["llama", "gemma3", "olmo2", "gpt_neox"])
def test_half_precision_is_computed_in_float32_and_leaves_no_gradients(family, tmp_path):
    student = student_of(family).bfloat16()
    found = recover(teacher_of(family).bfloat16(), student, TEXTS, settings("br+gp"), tmp_path, quiet=True)
    assert any(block.kept for block in found.blocks)
    assert all(parameter.dtype == torch.bfloat16 and parameter.grad is None for parameter in student.parameters())


def test_errors_and_qualities_are_those_of_the_whole_models(tmp_path, monkeypatch):
    monkeypatch.setattr(recovering, "CHUNK", 5)
    teacher, student = teacher_of("llama"), student_of("llama")
    old = copy.deepcopy(student)
    found = recover(teacher, student, TEXTS, settings("br+gp", keep_best=False), tmp_path, quiet=True)
    with torch.no_grad():
        for name, ids in TEXTS.by_name().items():
            streams_of = [model(input_ids=ids, output_hidden_states=True).hidden_states[1] for model in (teacher, old)]
            truth, before = streams_of
            off = (before - truth).square()
            error = found.blocks[0].before[name]
            assert error.error == pytest.approx(off.mean().item(), rel=1e-4)
            relative = (off.sum(-1) / truth.square().sum(-1)).clamp_max(1).mean().item()
            assert error.relative == pytest.approx(relative, rel=1e-4)
        for name, ids in (("held_out", TEXTS.held_out), ("other", TEXTS.other)):
            for model, measured in ((old, found.before), (student, found.after)):
                assert measured[name].nll == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
                p, q = (each(input_ids=ids).logits[:, :-1].double().log_softmax(-1) for each in (teacher, model))
                assert measured[name].kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)


def test_windows_of_two_overlap():
    crossing = [(list(w.blocks), w.following) for w in recovering._windows(4, crossing=True)]
    assert crossing == [([0], 0), ([0, 1], 1), ([1, 2], 2), ([2, 3], 4)]
    assert [list(w.blocks) for w in recovering._windows(1, crossing=True)] == [[0]]


def test_calibration_and_held_out_text_share_no_window():
    with pytest.raises(CalibrationError, match=r"2 window\(s\) are in both the calibration and the held-out text"):
        Texts(TEXTS.calibration, torch.cat([TEXTS.held_out, TEXTS.calibration[:2]]))


@pytest.mark.parametrize(("space", "what"), [("hidden", "hidden_size"), ("blocks", "num_hidden_layers")])
def test_streams_that_cannot_be_compared_are_refused(tmp_path, space, what):
    with pytest.raises(UnsupportedModelError, match=f"the teacher's {what} is .* cannot be compared"):
        recover(teacher_of("llama"), student_of("llama", space), TEXTS, settings(), tmp_path, quiet=True)


@pytest.mark.parametrize("method", ["lr", "lr+br"])
def test_lr_refuses_writers_of_a_part_of_the_stream(tmp_path, method):
    with pytest.raises(UnsupportedModelError, match="use 'br' or 'br\\+gp'"):
        recover(teacher_of("llama"), student_of("llama", "disp"), TEXTS, settings(method), tmp_path, quiet=True)


def test_a_damaged_file_is_said(tmp_path):
    recover(teacher_of("llama"), student_of("llama"), TEXTS, settings("lr"), tmp_path, quiet=True)
    (tmp_path / "window_0001.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"window_0001.safetensors is damaged .* start again"):
        recover(teacher_of("llama"), student_of("llama"), TEXTS, settings("lr"), tmp_path, quiet=True)


@pytest.mark.parametrize(
    "wrong",
    [{"method": "gp"}, {"epochs": 0}, {"learning_rate": 0.0}, {"train": "none"}, {"keep_best": 1}, {"seed": -1}],
)
def test_settings_are_checked(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}=.* is not allowed: it must be"):
        RecoverySettings(**wrong)


def test_settings_that_a_method_looks_at():
    adam = {"train", "learning_rate", "epochs", "batch_size"}
    for method, own in (("lr", {"ridge"}), ("br+gp", adam), ("lr+br+gp", adam | {"ridge"})):
        assert settings(method).in_use().keys() == {"method", "keep_best", "seed"} | own


def test_nothing_of_the_random_streams_is_touched(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    recover(teacher_of("llama"), student_of("llama"), TEXTS, settings(epochs=1), tmp_path, quiet=True)
    assert torch.equal(torch.rand(4), expected)
