"""What is timed on a GPU runs; what it computes is the other tests' affair."""

from atp.bench import kernel_cases
from atp.config import ATPConfig
from atp.ops.kernels import boundary, compaction, decode, gated
from tests import tiny
from tests.ops.kernels import in_the_interpreter

pytestmark = in_the_interpreter


def test_every_case_of_kernels_runs(monkeypatch):
    monkeypatch.setattr("atp.bench.kernels.uses_triton", lambda _x, _impl: True)
    launched = []
    for module, name in ((boundary, "forward"), (gated, "forward"), (compaction, "gather"), (decode, "launch")):
        launch = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, m=module, f=launch: launched.append(m) or f(*a))
    cases = kernel_cases(tiny.model(), ATPConfig(space="disp", sparsity=0.5, round_to=1), tokens=3)
    with_kernels = [case for of_bench in cases.values() for case in of_bench if "kernels" in case.name]
    assert len(with_kernels) == len(cases)
    for case in with_kernels:
        case.call()
    assert set(launched) == {boundary, gated, compaction, decode}
