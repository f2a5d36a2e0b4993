"""What llama.cpp takes of a model: rows that its one-bit type Q1_0 can hold, and kinds of text models that it has a name for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GROUP = 128
"""Weights of a row that share a scale in GGUF's Q1_0."""


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp names and stores a kind of text model.

    Attributes:
        name: of the architecture.
        rotated: whether rows of query and key projections come in another order (both halves of a rotary pair together).
        gain_offset: what is added to the weights of norms.
        activation: of the feed-forward network, as configs name it.
    """

    name: str
    rotated: bool = False
    gain_offset: float = 0.0
    activation: str = "silu"


ARCHITECTURES = {
    "llama": Architecture("llama", rotated=True),
    "mistral": Architecture("llama", rotated=True),
    "qwen2": Architecture("qwen2"),
    "qwen2_vl_text": Architecture("qwen2vl"),
    "qwen2_5_vl_text": Architecture("qwen2vl"),
    "qwen3": Architecture("qwen3"),
    "gemma3_text": Architecture("gemma3", gain_offset=1.0, activation="gelu_pytorch_tanh"),
    "olmo2": Architecture("olmo2"),
    "phi3": Architecture("phi3"),
}
"""`model_type` of a text config → its architecture."""


def architecture_of(config: Any) -> Architecture:
    """Return the architecture of a text config.

    Raises:
        ValueError: it is none of those that can be exported.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise ValueError(
            f"a GGUF file can be written for text models of the types {sorted(ARCHITECTURES)}, and this one is "
            f"{config.model_type!r}; use the checkpoint in transformers"
        )
    return found


def check_rows(shapes: Mapping[str, tuple[int, int]]) -> None:
    """Check that Q1_0 can hold matrices.

    Args:
        shapes: name → (out_features, in_features).
    Raises:
        ValueError: rows of one cannot be cut into groups.
    """
    for name, (_, in_features) in shapes.items():
        if in_features % GROUP:
            raise ValueError(
                f'portable="gguf" needs rows of a multiple of {GROUP} weights, and `{name}` has {in_features}; llama.cpp has no '
                "one-bit type for them. Leave `portable` out and use the packed checkpoint in transformers, or take a model of "
                "other widths"
            )
