"""The pruning-decision generator: learned block embeddings -> Transformer encoder -> logits for every group.

ATP (arXiv 2412.14426) section 3.2: E in R^(L x d) passes a Transformer encoder and a LayerNorm; one projection per
group kind, shared by all blocks, gives the logits; groups of the whole model take the mean over blocks. float32
whatever the model's dtype. On top of the paper's form each set has a constant `start`: b for every group when starting
from all ones, or graded logits that reproduce a criterion's decision, which the network then refines.
"""

import torch
from torch import Tensor, nn

from atp.randomness import drawn_aside
from atp.structure.space import GroupSet, Space


class DecisionGenerator(nn.Module):
    """Emits one logit per group.

    Args:
        space: the table of groups.
        hidden_size, layers, heads: of the Transformer encoder.
        seed: of its initial weights; the global random state is left alone.
    """

    def __init__(self, space: Space, hidden_size: int, layers: int, heads: int, seed: int) -> None:
        super().__init__()
        self._sets = space.sets
        blocks = len(space.structure.blocks)
        with drawn_aside(seed=seed):
            self.blocks = nn.Parameter(torch.randn(blocks, hidden_size))
            layer = nn.TransformerEncoderLayer(
                hidden_size, heads, dim_feedforward=4 * hidden_size, dropout=0.0, batch_first=True, norm_first=True
            )
            self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
            self.norm = nn.LayerNorm(hidden_size)
            self.heads = nn.ModuleDict({_head(s): _small_linear(hidden_size, s.size) for s in space.sets})
        self.start = nn.ParameterDict({_key(s): nn.Parameter(torch.zeros(s.size), False) for s in space.sets})

    def set_start(self, logits: dict[str, Tensor]) -> None:
        """Set the constant that is added to each set's logits, `(size,)`."""
        with torch.no_grad():
            for s in self._sets:
                self.start[_key(s)].copy_(logits[s.name])

    def forward(self) -> dict[str, Tensor]:
        """Logits per group set, `(size,)`."""
        states = self.norm(self.encoder(self.blocks.unsqueeze(0)).squeeze(0))
        emitted = {name: head(states) for name, head in self.heads.items()}
        return {s.name: _of_block(emitted[_head(s)], s.block) + self.start[_key(s)] for s in self._sets}


class FreeLogits(nn.Module):
    """The control: one trainable logit per group and no network; also holds logits that nobody trains."""

    def __init__(self, space: Space) -> None:
        super().__init__()
        self._sets = space.sets
        self.logits = nn.ParameterDict({_key(s): nn.Parameter(torch.zeros(s.size)) for s in space.sets})

    def set_start(self, logits: dict[str, Tensor]) -> None:
        """Set each set's logits, `(size,)`."""
        with torch.no_grad():
            for s in self._sets:
                self.logits[_key(s)].copy_(logits[s.name])

    def forward(self) -> dict[str, Tensor]:
        """Logits per group set, `(size,)`; tensors of their own."""
        return {s.name: self.logits[_key(s)].clone() for s in self._sets}


def _of_block(emitted: Tensor, block: int | None) -> Tensor:
    """A block's row of `(blocks, size)`, or the mean of all."""
    return emitted.mean(0) if block is None else emitted[block]


def _small_linear(in_features: int, out_features: int) -> nn.Linear:
    """A projection that hardly moves the start before it is trained."""
    linear = nn.Linear(in_features, out_features)
    nn.init.normal_(linear.weight, std=1e-3)
    nn.init.zeros_(linear.bias)
    return linear


def _head(group_set: GroupSet) -> str:
    return f"{group_set.kind}_{group_set.size}"


def _key(group_set: GroupSet) -> str:
    return f"{group_set.kind}_{group_set.block}"
