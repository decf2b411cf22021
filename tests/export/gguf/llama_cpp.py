"""llama.cpp as a test calls it: a GGUF file -> greedy tokens, log-probabilities, and a text's tokens.

Needs `xllamacpp`, which is llama.cpp compiled for CPUs with a server around it.
"""

import json
import math
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Generated:
    """Greedy tokens, and at each step the log-probabilities of the whole vocabulary, `(steps, vocabulary)`."""

    tokens: list[int]
    log_probabilities: Tensor


class LlamaCpp:
    """A file opened by llama.cpp, its cache in float32."""

    def __init__(self, path: Path, vocabulary: int, threads: int = 1) -> None:
        x = pytest.importorskip("xllamacpp", reason="runs llama.cpp: pip install xllamacpp")

        settings = x.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = 256, 1, False, -1
        settings.cpuparams.n_threads = threads
        settings.cache_type_k = settings.cache_type_v = x.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server, self._vocabulary = x.Server(settings), vocabulary

    def generate(self, prompt: list[int], steps: int) -> Generated:
        """Greedy from token ids as they are; the end is never taken."""
        asked = {"prompt": prompt, "n_predict": steps, "temperature": 0, "n_probs": self._vocabulary}
        asked |= {"return_tokens": True, "cache_prompt": False, "ignore_eos": True}
        answer = self._post("/completion", asked)
        rows = torch.full((len(answer["tokens"]), self._vocabulary), -math.inf)
        for row, step in zip(rows, answer["completion_probabilities"], strict=True):
            for candidate in step["top_logprobs"]:
                row[candidate["id"]] = candidate["logprob"]
        return Generated(answer["tokens"], rows)

    def tokenize(self, text: str) -> list[int]:
        """As the file's tokenizer does, special tokens in the text and around it included."""
        return self._post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def _post(self, path: str, asked: dict) -> dict:
        request = urllib.request.Request(
            self._server.listening_address + path, json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)
