"""Questions with known answers, and passages of text, as batches that a model can be scored on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..calibration.chat import ChatEncoder
from ..calibration.modality import TEXT, token_modality
from ..calibration.origins import read_samples
from ..calibration.samples import Sample
from ..config import check_seed


@dataclass(frozen=True)
class Question:
    """A conversation that ends with the right answer, or (without one) a passage to predict.

    Attributes:
        sample: the whole conversation.
        accepted: accepted answers to its last question; empty for a passage.
    """

    sample: Sample
    accepted: tuple[str, ...]

    @property
    def prompt(self) -> Sample:
        """The conversation up to the answer."""
        return replace(self.sample, messages=self.sample.messages[:-1])

    @property
    def text(self) -> str:
        """The last question in words."""
        return _text(self.sample.messages[-2 if self.accepted else -1])


@dataclass(frozen=True)
class QuestionBatch:
    """One forward pass, and one generation if the questions have answers.

    Attributes:
        questions: the rows.
        whole: processed conversations, padded on the right.
        targets: [batch, length] bool, the tokens of `whole` to predict: the answer and what ends its turn, or all text.
        prompts: processed conversations up to the answer, padded on the left; None for passages.
    """

    questions: list[Question]
    whole: dict[str, Any]
    targets: Tensor
    prompts: dict[str, Any] | None


def read_questions(data: Any, num_samples: int, seed: int, with_images: bool) -> list[Question]:
    """Read questions from any source that calibration reads (a name, a path, samples in memory), in shuffled order.

    Args:
        data: samples in a form of `SABQuantizationConfig.calibration`, except processed batches; "answers" of a row
            are all accepted.
        num_samples: most questions to take.
        seed: seed of the shuffle, and of the built-in set.
        with_images: whether the model takes images; else those with media are left out.
    Raises:
        ValueError: the source has none of the accepted forms, or nothing is left.
    """
    check_seed(seed)
    try:
        samples = list(read_samples(data, seed=seed, limit=num_samples, with_images=with_images))
    except ValueError as error:
        raise ValueError(str(error).replace("`calibration`", "`data`").replace("calibration ", "")) from error
    questions = [_question(sample) for sample in samples if with_images or not sample.num_media]
    if not questions:
        raise ValueError("an evaluation needs at least one sample without images for a text-only processor, got none")
    return questions


def encode_questions(
    questions: list[Question], encoder: ChatEncoder, model_config: Any, batch_size: int
) -> Iterator[QuestionBatch]:
    """Yield batches of alike kind and length; which samples share a batch depends on the data alone."""
    if encoder.tokenizer.pad_token is None:
        batch_size = 1
    kinds: dict[tuple[bool, bool], list[Question]] = {}
    for question in questions:
        kinds.setdefault((bool(question.accepted), bool(question.sample.num_media)), []).append(question)
    for (answered, _), group in sorted(kinds.items(), reverse=True):
        group.sort(
            key=lambda question: (question.sample.num_media, sum(map(len, map(_text, question.sample.messages))))
        )
        rows = iter(group)
        while batch := list(itertools.islice(rows, batch_size)):
            yield _encode(batch, encoder, model_config, answered)


def encode_with_targets(
    questions: list[Question], encoder: ChatEncoder, model_config: Any
) -> tuple[dict[str, Any], Tensor]:
    """Process whole conversations; questions and passages may be mixed, and where the processor allows it pictures and none.

    Returns:
        The model inputs, padded on the right, and the targets as in `QuestionBatch`.
    """
    whole = encoder([question.sample for question in questions], padding=len(questions) > 1)
    targets = _passage_targets(whole, model_config)
    answered = [row for row, question in enumerate(questions) if question.accepted]
    if answered:
        prompts = _encode_prompts([questions[row] for row in answered], encoder)
        targets[answered] = _answer_targets(whole, prompts, answered)
    return whole, targets


def _encode(questions: list[Question], encoder: ChatEncoder, model_config: Any, answered: bool) -> QuestionBatch:
    whole = encoder([question.sample for question in questions], padding=len(questions) > 1)
    if not answered:
        return QuestionBatch(questions, whole, _passage_targets(whole, model_config), None)
    prompts = _encode_prompts(questions, encoder)
    return QuestionBatch(questions, whole, _answer_targets(whole, prompts, list(range(len(questions)))), prompts)


def _encode_prompts(questions: list[Question], encoder: ChatEncoder) -> dict[str, Any]:
    prompts = [question.prompt for question in questions]
    return encoder(prompts, padding=len(questions) > 1, padding_side="left", reply=True)


def _passage_targets(whole: dict[str, Any], model_config: Any) -> Tensor:
    """Return [batch, length] bool: all text but the first token, which nothing predicts."""
    targets = token_modality(whole, model_config) == TEXT
    targets[:, 0] = False
    return targets


def _answer_targets(whole: dict[str, Any], prompts: dict[str, Any], rows: list[int]) -> Tensor:
    """Return [len(rows), length] bool: the answer and what ends its turn, in `rows` of `whole`, whose prompts are given."""
    mask = whole.get("attention_mask", torch.ones_like(whole["input_ids"]))
    prompt_mask = prompts.get("attention_mask", torch.ones_like(prompts["input_ids"]))
    targets = torch.zeros_like(mask[rows], dtype=torch.bool)
    for i, row in enumerate(rows):
        length = int(mask[row].sum())
        prompt = prompts["input_ids"][i][prompt_mask[i].bool()]
        start = _shared_prefix(prompt, whole["input_ids"][row, :length])
        targets[i, start:length] = True
    return targets


def _shared_prefix(prompt: Tensor, whole: Tensor) -> int:
    """Return how many tokens both begin with: where the answer starts."""
    length = min(len(prompt), len(whole))
    differs = (prompt[:length] != whole[:length]).nonzero()
    return int(differs[0]) if len(differs) else length


def _question(sample: Sample) -> Question:
    if len(sample.messages) < 2 or sample.messages[-1]["role"] != "assistant":
        return Question(sample, ())
    return Question(sample, sample.answers or (_text(sample.messages[-1]),))


def _text(message: dict[str, Any]) -> str:
    return "\n".join(part["text"] for part in message["content"] if part["type"] == "text")
