"""What a model writes: greedy continuations, to be read side by side."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atp.passes import evaluating


@torch.no_grad()
def continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int = 48) -> str:
    """What `model` writes after `prompt`: up to so many tokens, the likeliest at each place.

    A prompt that leaves no room for them in the model's context loses its start; one without tokens goes on with "".
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    ids = tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"]
    if not ids.numel():
        return ""
    if longest is not None:
        ids = ids[:, -max(longest - new_tokens, 1) :]
    ids = ids.to(model.device)
    with evaluating(model):
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
