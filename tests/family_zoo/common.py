"""What the tiny families share: sizes, token ids, and batches with placeholder tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

HIDDEN, INNER, VOCAB, BLOCKS = 32, 64, 128, 2
PAD, BOS, EOS, IMAGE, VIDEO, AUDIO, START, END = 0, 1, 2, 120, 121, 122, 123, 124
WORDS = range(3, 120)
INIT = 0.2
"""Standard deviation of random weights: large enough that blocks change the hidden states."""
SIDE, PATCH = 16, 8  # pixels: four patches


@dataclass
class Family:
    """A tiny random model of a family and processed batches for it.

    Attributes:
        model: in evaluation mode, float32.
        batches: processed batches; the last one is what is generated from.
        generates: whether `generate` takes such batches and gives tokens.
        settings: of the quantization config, where the defaults refuse such batches.
    """

    model: nn.Module
    batches: list[dict[str, Tensor]]
    generates: bool = True
    settings: dict[str, Any] = field(default_factory=dict)


def get(name: str) -> Any:
    """Return a class of transformers, or raise an ImportError that says that this version has none of this name."""
    try:
        return getattr(transformers, name)
    except AttributeError:
        raise ImportError(f"not in transformers {transformers.__version__}") from None


def text(**changes: Any) -> dict[str, Any]:
    """Return the fields that most text configs share."""
    values = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "initializer_range": INIT,
    }
    return values | changes


def vision(**changes: Any) -> dict[str, Any]:
    """Return the fields that most vision configs share."""
    values = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "initializer_range": INIT,
    }
    return values | changes


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(*media: tuple[int, int], words: int = 14, seed: int = 0, framed: bool = False) -> dict[str, Tensor]:
    """Return one row of tokens: words, then each placeholder as often as asked, then words.

    Args:
        media: placeholder id and how many of it.
        words: how many words in all.
        seed: of the words.
        framed: put a start and an end token around each placeholder run.
    """
    drawn = torch.randint(WORDS.start, WORDS.stop, (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    row = drawn[: words // 2]
    for token, count in media:
        run = [token] * count
        row += [START, *run, END] if framed else run
    row += drawn[words // 2 :]
    input_ids = torch.tensor([row])
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def batches(make: Callable[[int], dict[str, Tensor]], count: int = 3) -> list[dict[str, Tensor]]:
    return [make(seed) for seed in range(count)]


def build(model_class: str, config: Any) -> nn.Module:
    """Return a random model that generates without an end."""
    torch.manual_seed(0)
    model = get(model_class)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and float(parameter.std()) < INIT / 20:  # zero or nearly: it would hide what is lost
                parameter.normal_(std=INIT)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = PAD
    return model


def ids(**extra: int) -> dict[str, int]:
    return {"image_token_id": IMAGE, **extra}


def typed(inputs: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Add `mm_token_type_ids`, as a processor of transformers 5 does for models with multimodal positions."""
    if "mm_token_type_ids" not in inspect.signature(inspect.unwrap(type(model).forward)).parameters:
        return inputs
    ids_ = inputs["input_ids"]
    kinds = 1 * (ids_ == IMAGE) + 2 * (ids_ == VIDEO) + 3 * (ids_ == AUDIO)
    return inputs | {"mm_token_type_ids": kinds.int()}
