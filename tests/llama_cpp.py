"""What llama.cpp makes of a GGUF file: its server in this process, from the prebuilt package `xllamacpp`."""

from __future__ import annotations

import base64
import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


class LlamaCpp:
    """A running server with one model.

    Args:
        address: of the server.
    """

    def __init__(self, address: str):
        self._address = address

    def ask(self, endpoint: str, **content: Any) -> dict[str, Any]:
        """Return the answer of an endpoint to what is posted there."""
        request = urllib.request.Request(
            f"{self._address}/{endpoint}", json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a text, without those that are put around it."""
        return self.ask("tokenize", content=text, add_special=False)["tokens"]

    def log_probabilities(self, prompt: Any, vocab_size: int) -> Tensor:
        """Return the log-probability [vocab_size] of each token after a prompt: tokens, or text with a picture."""
        chosen = {
            "temperature": 0.0,
            "logit_bias": [[self.tokens("a")[0], 1e4]],
        }  # half a character would have no answer
        answer = self.ask("completion", prompt=prompt, n_predict=1, n_probs=vocab_size, cache_prompt=False, **chosen)
        result = torch.full((vocab_size,), -torch.inf)
        for token in answer["completion_probabilities"][0]["top_logprobs"]:
            result[token["id"]] = token["logprob"]
        return result

    def prompt_with(self, picture: bytes, before: str, after: str) -> dict[str, Any]:
        """Return a prompt of text with the file of a picture in it."""
        with urllib.request.urlopen(f"{self._address}/props", timeout=60) as answer:
            marker = json.load(answer)["media_marker"]
        return {
            "prompt_string": before + marker + after,
            "multimodal_data": [base64.b64encode(picture).decode()],
        }

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """Return the most likely tokens after those given."""
        answer = self.ask(
            "completion", prompt=ids, n_predict=count, temperature=0.0, return_tokens=True, ignore_eos=True
        )
        return answer["tokens"]


@contextmanager
def serving(path: Path, mmproj: Path | None = None) -> Iterator[LlamaCpp]:
    """Give llama.cpp with the model of a file, on one thread."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="needs the package xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.verbosity = str(path), 0
    params.n_ctx, params.n_parallel, params.warmup, params.fit_params = 512, 1, False, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    if mmproj is not None:
        params.mmproj.path, params.mmproj_use_gpu = str(mmproj), False
    server = xllamacpp.Server(params)
    try:
        yield LlamaCpp(server.listening_address)
    finally:
        del server
