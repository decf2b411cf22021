"""Kernels inside whole blocks and whole runs. Oracle: the same computed eagerly."""

import pytest

from tests import families, runs
from tests.layers.test_fused_blocks import agree, attached, results
from tests.ops.kernels import in_the_interpreter

pytestmark = in_the_interpreter


@pytest.mark.parametrize(("family", "space_name"), [("llama", "width"), ("llama", "disp"), ("qwen3", "disp")])
def test_blocks_compute_the_same_by_kernels(family, space_name):
    model, attachment = attached(family, space_name)
    expected = results(model, attachment)
    attachment.fuse_blocks("triton")
    agree(results(model, attachment), expected, 1e-4)
    attachment.compact()
    compact = results(model, attachment)
    agree(compact, {name: expected[name] for name in compact}, 1e-4)


def test_a_run_ends_with_the_same_adapters_and_decision(tmp_path):
    """With a teacher, a criterion's scores, and a refit, which see layers as they are without kernels."""
    ends = {}
    for impl in ("eager", "triton"):
        model = runs.peft_model()
        config = runs.config(space="disp", impl=impl, **runs.LATE)
        trainer = runs.trainer(tmp_path / impl, config, model=model, max_steps=5, per_device_train_batch_size=1)
        trainer.train()
        ends[impl] = runs.adapter(trainer), families.logits(model)
    assert runs.worst(ends["triton"][0], ends["eager"][0]) < 1e-3
    assert families.relative_error(ends["triton"][1], ends["eager"][1]) < 1e-3
