"""FLOPs per token of the forward pass: twice the weights of every linear layer that a token goes through.

The head counts, embeddings do not. Not covered: attention scores and their weighted sum (they grow with the context),
norms, activations, biases, and layers that are not `nn.Linear`.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp.passes import evaluating, removed_after

_TOKENS = 4


@torch.no_grad()
def flops_per_token(model: PreTrainedModel) -> int:
    """Count the linear layers that run in one short forward, each as often as it runs.

    Works on adapters and on quantised layers that derive from `nn.Linear` alike.
    """
    counted = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal counted
        assert isinstance(module, nn.Linear)
        counted += 2 * module.in_features * output.numel()

    handles = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, nn.Linear)]
    with evaluating(model), removed_after(handles):
        model(input_ids=torch.zeros(1, _TOKENS, dtype=torch.long, device=model.device), use_cache=False)
    return counted // _TOKENS
