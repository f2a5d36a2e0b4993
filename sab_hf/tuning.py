"""Questions with answers as training data for `Trainer`, for adapters on packed models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .calibration.chat import ChatEncoder, borrowed
from .evaluate.questions import Question, encode_with_targets, read_questions

IGNORED = -100
"""Label of a token that is not learnt."""


def training_data(
    data: Any,
    model: nn.Module,
    processor: Any,
    *,
    num_samples: int = 100_000,
    seed: int = 0,
    max_image_pixels: int | None = 1024 * 1024,
    allow_urls: bool = False,
) -> dict[str, Any]:
    """Read questions with answers, and return what `Trainer` needs to learn the answers.

        data = training_data("my_questions.jsonl", model, processor)
        Trainer(model, TrainingArguments(..., remove_unused_columns=False), **data).train()

    Args:
        data: questions in any form that calibration takes, except processed batches; the last reply of a
            conversation is learnt, all text of a passage.
        model: the model to train, or its packed base.
        processor: its processor (a tokenizer for a text-only model).
        num_samples: most samples to read.
        seed: seed of their order.
        max_image_pixels: larger images are shrunk to this many pixels; None keeps them.
        allow_urls: whether files that samples name by URL are fetched.
    Returns:
        `train_dataset`, a list of samples, and `data_collator`, which makes a batch of some: model inputs padded on the right,
        and labels that are -100 except for what is learnt.
    Raises:
        ValueError: the data has none of the accepted forms.
    """
    encoder = ChatEncoder(processor, max_image_pixels, allow_urls)
    questions = read_questions(data, num_samples, seed, with_images=not encoder.text_only)
    return {"train_dataset": questions, "data_collator": _collator(encoder, model.config)}


def _collator(encoder: ChatEncoder, model_config: Any) -> Callable[[list[Question]], dict[str, Tensor]]:
    def collate(questions: list[Question]) -> dict[str, Tensor]:
        with borrowed(encoder.tokenizer):
            inputs, targets = encode_with_targets(questions, encoder, model_config)
        return {**inputs, "labels": inputs["input_ids"].masked_fill(~targets, IGNORED)}

    return collate
