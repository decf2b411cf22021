"""The device itself. Oracle: the CPU, and what CUDA is known to refuse."""

import pytest
import torch
from torch import nn

from tests.device import in_its_own_process, second

pytestmark = in_its_own_process


@pytest.fixture
def x(device):
    return torch.arange(6.0).view(2, 3).to("second")


def test_it_computes_what_the_cpu_does(device):
    torch.manual_seed(0)
    layer, near = nn.Linear(3, 2), torch.randn(4, 3)
    expected = layer(near).square().mean()
    expected.backward()
    gradient = layer.weight.grad
    layer.weight.grad = None
    layer.to("second")
    loss = layer(near.to("second")).square().mean()
    loss.backward()
    assert loss.device.type == layer.weight.grad.device.type == "second"
    assert loss.item() == expected.item()
    assert torch.equal(layer.weight.grad.cpu(), gradient)


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.ones(2, 3).add_(x),
        lambda x: torch.zeros(()).add_(x.sum()),
        lambda x: torch.stack([torch.zeros(()), x.sum()]),
        lambda x: x.index_put((torch.tensor([0]),), torch.ones(3)),
        lambda x: x.gather(1, torch.zeros(2, 1, dtype=torch.long)),
        lambda x: torch.nn.functional.linear(x, torch.ones(4, 3)),
        lambda x: torch.empty_like(x).normal_(generator=torch.Generator()),
        lambda x: torch.rand(2, device=x.device, generator=torch.Generator()),
    ],
)
def test_what_cuda_refuses_is_refused(mix):
    reason = r"(tensors of two devices|a generator of the CPU).*test_second.py:\d"
    with pytest.raises(RuntimeError, match=reason), second.second_device():
        mix(torch.arange(6.0).view(2, 3).to("second"))


def test_what_is_refused_in_a_backward_pass_is_known_at_the_end():
    def backward():
        y = torch.ones(2, requires_grad=True, device="second") * 2
        y.register_hook(lambda gradient: gradient + torch.ones(2))
        y.sum().backward()

    with pytest.raises(RuntimeError, match="tensors of two devices"), second.second_device():
        backward()


def test_numpy_has_no_tensor_of_another_device(x):
    with pytest.raises(RuntimeError, match="numpy"):
        x.numpy()


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x * torch.tensor(2.0),
        lambda x: x[:, torch.tensor([0, 2])],
        lambda x: x[torch.tensor([True, False])],
        lambda x: x.masked_fill(x > 2, torch.tensor(0.0)),
        lambda x: x.clone().copy_(torch.ones(2, 3)),
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: torch.as_tensor([1, 2], device=x.device),
    ],
)
def test_what_cuda_takes_is_taken(x, mix):
    expected = mix(x.cpu())
    found = mix(x)
    assert found.device == x.device
    assert found.dtype == expected.dtype
    assert torch.equal(found.cpu(), expected)


def test_a_view_is_of_the_same_memory(x):
    x.view(-1)[:2].zero_()
    assert x.tolist() == [[0.0, 0.0, 2.0], [3.0, 4.0, 5.0]]
