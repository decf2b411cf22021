"""The residual stream of a model: what makes it, which norms stand where on it, and how narrow it may be.

With c = sqrt(H'/H), H' of H dimensions left, a model computes the same when all that is added to the stream (the
embedding's and the writers' rows) is c times what it was and all that reads it (a norm before a reader, or the reader
itself where there is none, as in OLMo 2) gives 1/c: an RMS norm then divides by the very same root, and `eps` stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from atp.structure.families import NORMS_BEFORE, NORMS_EITHER, NORMS_WRITING
from atp.structure.sharding import shape_of


@dataclass(frozen=True)
class Stream:
    """Paths inside the causal LM.

    Attributes:
        embedding, head: what opens the stream, and what reads it last.
        last_norm: the norm before the head.
        norms_before: norms that read it for a reader, block after block.
        norms_writing: norms between a writer and the stream.
        bare_halves: attentions and MLPs that read it without a norm.
        step: its width may be a multiple of this; 0 where the config can say no other.
        refusal: why it cannot be cut, if so.
    """

    embedding: str = ""
    head: str = ""
    last_norm: str = ""
    norms_before: tuple[str, ...] = ()
    norms_writing: tuple[str, ...] = ()
    bare_halves: tuple[str, ...] = ()
    step: int = 0
    refusal: str | None = None


def find_stream(lm: PreTrainedModel, blocks: Sequence[tuple[str, str, str]], step: int) -> Stream:
    """The stream of a causal LM.

    Args:
        blocks: paths of each block, of its attention and of its MLP.
        step: what its width must be a multiple of, by its config; 0 where there is no other.
    """
    names = {module: name for name, module in lm.named_modules()}
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    if head is None or head not in names or embedding not in names:
        return Stream(refusal=f"{type(lm).__name__} has no embedding and head that can be found")
    if not step:
        return Stream(refusal=f"a {lm.config.model_type} config cannot say another hidden_size beside its head size")
    hidden, before, writing, bare = lm.config.hidden_size, [], [], []
    for path, attention, mlp in blocks:
        norms = _norms(lm.get_submodule(path), hidden)
        for name, norm in norms.items():
            if not _is_rms(norm) or name not in NORMS_BEFORE | NORMS_WRITING | NORMS_EITHER:
                return Stream(refusal=f"{path}.{name} ({type(norm).__name__}) is not an RMS norm whose place is known")
        after = {name for name in norms if name in NORMS_WRITING}
        after |= {name for name in norms if name in NORMS_EITHER and after}
        before += [f"{path}.{name}" for name in norms if name not in after]
        writing += [f"{path}.{name}" for name in norms if name in after]
        bare += [attention, mlp] if len(norms) == len(after) else []
    prefix = blocks[0][0].rsplit(".", 2)[0]
    last = _norms(lm.get_submodule(prefix), hidden)
    if len(last) != 1 or not all(_is_rms(norm) for norm in last.values()):
        return Stream(refusal=f"{prefix} does not end in one RMS norm")
    last_norm = f"{prefix}.{next(iter(last))}"
    return Stream(names[embedding], names[head], last_norm, tuple(before), tuple(writing), tuple(bare), step)


def _norms(module: nn.Module, hidden: int) -> dict[str, nn.Module]:
    """Children that are norms over the whole stream."""
    weights = {name: getattr(child, "weight", None) for name, child in module.named_children()}
    over = {name for name, w in weights.items() if isinstance(w, Tensor) and tuple(shape_of(w)) == (hidden,)}
    return {name: child for name, child in module.named_children() if name in over}


def _is_rms(norm: nn.Module) -> bool:
    return "RMSNorm" in type(norm).__name__ and set(dict(norm.named_parameters())) == {"weight"}
