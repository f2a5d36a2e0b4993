"""Score a model, and compare it with its original: right answers, perplexity, agreement, KL."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from ..calibration.chat import ChatEncoder, borrowed
from ..config import check_seed
from ..processors import processor_of
from ..publish.locate import read_config
from ..publish.open import hub_options, opening_class
from ..publish.report import finite
from .questions import QuestionBatch, encode_questions, read_questions
from .scorers import SCORERS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """What one model scored.

    Attributes:
        metrics: scorer name → mean over the questions, 0 to 1; empty if the data has no answers.
        nll: nats per token of the right answers (what ends the turn included) and of passages, given all before it.
    """

    metrics: dict[str, float]
    nll: float

    @property
    def perplexity(self) -> float:
        """Return e^nll; infinite where that is too large for a float."""
        return math.exp(self.nll) if self.nll < 700 else math.inf


@dataclass(frozen=True)
class Answer:
    """One question with what was accepted, what the model said, and what its original said (None if there was none)."""

    question: str
    accepted: tuple[str, ...]
    given: str
    given_by_original: str | None


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`; `str()` gives a table, `to_dict()` plain data.

    Attributes:
        data, seed: what was asked.
        num_samples, num_questions, num_tokens: samples; those with an answer; predicted tokens.
        model, original: scores; `original` is None without a model to compare with.
        answer_agreement: share of questions that both models answer with the same text, greedily.
        token_agreement: share of the predicted tokens for which both find the same token most likely.
        kl: mean KL(original ‖ model) of the next-token distributions at the predicted tokens, nats.
        answers: every question with its answers.
    """

    data: str
    seed: int
    num_samples: int
    num_questions: int
    num_tokens: int
    model: Scores
    original: Scores | None = None
    answer_agreement: float | None = None
    token_agreement: float | None = None
    kl: float | None = None
    answers: list[Answer] = field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, Any]:
        plain = dataclasses.asdict(self)
        plain["model"]["perplexity"] = self.model.perplexity
        if self.original:
            plain["original"]["perplexity"] = self.original.perplexity
        return plain

    def to_json(self) -> str:
        return json.dumps(finite(self.to_dict()), indent=2)

    def __str__(self) -> str:
        columns = [self.model] + ([self.original] if self.original else [])
        lines = [f"{'':<22}" + "".join(f"{name:>10}" for name in ("model", "original")[: len(columns)])]
        for name in self.model.metrics:
            lines.append(f"{name.replace('_', ' '):<22}" + "".join(f"{c.metrics[name]:>10.1%}" for c in columns))
        lines.append(f"{'nats per token':<22}" + "".join(f"{c.nll:>10.4f}" for c in columns))
        lines.append(f"{'perplexity':<22}" + "".join(f"{c.perplexity:>10.4g}" for c in columns))
        for name, value in (("same answer", self.answer_agreement), ("same likeliest token", self.token_agreement)):
            if value is not None:
                lines.append(f"{name:<22}{value:>10.1%}")
        if self.kl is not None:
            lines.append(f"{'KL to original, nats':<22}{self.kl:>10.4f}")
        about = f"{self.num_questions} questions and {self.num_samples - self.num_questions} passages"
        return "\n".join([*lines, f"{self.data}, seed {self.seed}: {about}, {self.num_tokens} predicted tokens"])


def evaluate(
    model: nn.Module | str | os.PathLike,
    processor: Any = None,
    data: Any = "builtin",
    *,
    original: nn.Module | str | os.PathLike | None = None,
    num_samples: int = 200,
    seed: int = 1,
    batch_size: int = 8,
    max_new_tokens: int = 32,
    max_image_pixels: int | None = 1024 * 1024,
    allow_urls: bool = False,
    scorers: dict[str, Callable[[str, Sequence[str]], float]] | None = None,
    **load_kwargs: Any,
) -> Evaluation:
    """Ask a model questions, and compare it with its original token by token. Greedy, in a fixed order.

    Both models are in memory at the same time; the same inputs go to both.

    Args:
        model: a generating transformers model, packed or not, or a path or Hub id to load one from.
        processor: its processor (a tokenizer for a text-only model); None: from where the model came.
        data: questions in any form that calibration takes, except processed batches: "builtin", a Hub dataset id, a
            folder, a JSONL file, samples. The last reply of a conversation is the right answer; "answers" of a row are
            all accepted. Samples without a reply are passages: they count for perplexity, agreement and KL only.
        original: the model to compare with, or a path or Hub id; None: no comparison.
        num_samples: most samples to use.
        seed: seed of their order, and of the built-in set (calibration draws it with seed 0: these are new samples).
        batch_size: samples of a forward pass; changes results by rounding only.
        max_new_tokens: most tokens of a greedy answer.
        max_image_pixels: larger images are shrunk to this many pixels; None keeps them.
        allow_urls: whether files that samples name by URL are fetched.
        scorers: name → (answer, accepted answers) → 0 to 1; None: exact match, ANLS, relaxed accuracy.
        load_kwargs: arguments of `from_pretrained`, where a path or id is given: `device_map`, `dtype`, `token`, …; `revision`
            and `subfolder` are those of `model` alone.
    Raises:
        ValueError: the data has none of the accepted forms, or the two models have different vocabularies.
    """
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    check_seed(seed)
    model, processor = _open(model, processor, load_kwargs)
    models = [model] if original is None else [model, _open(original, processor, _elsewhere(load_kwargs))[0]]
    scorers = SCORERS if scorers is None else scorers
    encoder = ChatEncoder(processor, max_image_pixels, allow_urls)
    questions = read_questions(data, num_samples, seed, with_images=not encoder.text_only)
    modes = [each.training for each in models]
    tally = _Tally(len(models))
    try:
        for each in models:
            each.eval()
        with torch.inference_mode(), borrowed(encoder.tokenizer), tqdm(total=len(questions), desc="evaluating") as bar:
            for batch in encode_questions(questions, encoder, model.config, batch_size):
                tally.add_tokens([_log_probabilities(each, batch) for each in models], batch)
                if batch.prompts is not None:
                    tally.add_answers([_greedy(each, encoder, batch, max_new_tokens) for each in models], batch)
                bar.update(len(batch.questions))
    finally:
        for each, mode in zip(models, modes, strict=True):
            each.train(mode)
    name = str(data) if isinstance(data, (str, os.PathLike)) else "samples in memory"
    return tally.result(name, seed, len(questions), scorers)


def _open(model: Any, processor: Any, load_kwargs: dict[str, Any]) -> tuple[nn.Module, Any]:
    """Load what is given as a path or id; a model in memory needs a processor, or a name to load one from."""
    hub = hub_options(load_kwargs)
    if isinstance(model, (str, os.PathLike)):
        name = model
        model = opening_class(read_config(name, **hub)).from_pretrained(name, **load_kwargs)
    else:
        name = getattr(model, "name_or_path", "")
    return model, processor_of(name, processor, "evaluation needs", "pass `processor`", **hub)


def _elsewhere(load_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return keyword arguments of `from_pretrained` without those that hold for one repository only."""
    return {name: value for name, value in load_kwargs.items() if name not in ("revision", "subfolder")}


class _Tally:
    """Sums over batches."""

    def __init__(self, num_models: int):
        self.nll, self.num_tokens = [0.0] * num_models, 0
        self.kl, self.same_tokens = 0.0, 0
        self.answers: list[Answer] = []

    def add_tokens(self, log_probabilities: list[Tensor], batch: QuestionBatch) -> None:
        """Count the tokens of a batch; log_probabilities: [targets, vocabulary] of each model."""
        tokens = batch.whole["input_ids"][batch.targets]
        self.num_tokens += len(tokens)
        for i, log_p in enumerate(log_probabilities):
            self.nll[i] -= float(log_p.gather(-1, tokens.to(log_p.device)[:, None]).double().sum())
        if len(log_probabilities) == 2:
            log_q, log_p = log_probabilities[0], log_probabilities[1].to(log_probabilities[0].device)
            if log_q.shape != log_p.shape:
                raise ValueError(
                    f"`model` and `original` must have one vocabulary, got {log_q.shape[-1]} and {log_p.shape[-1]} tokens"
                )
            self.kl += float((log_p.exp() * (log_p - log_q)).nan_to_num().double().sum())
            self.same_tokens += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())

    def add_answers(self, given: list[list[str]], batch: QuestionBatch) -> None:
        for row, question in enumerate(batch.questions):
            by_original = given[1][row] if len(given) == 2 else None
            self.answers.append(Answer(question.text, question.accepted, given[0][row], by_original))

    def result(self, data: str, seed: int, num_samples: int, scorers: dict[str, Callable]) -> Evaluation:
        said = [[(answer.given, answer.given_by_original)[i] for answer in self.answers] for i in range(len(self.nll))]
        scores = []
        for texts, nll in zip(said, self.nll, strict=True):
            metrics = {
                name: sum(scorer(text, answer.accepted) for text, answer in zip(texts, self.answers, strict=True))
                / len(texts)
                for name, scorer in scorers.items()
                if texts
            }
            scores.append(Scores(metrics, nll / max(1, self.num_tokens)))
        counts = (num_samples, len(self.answers), self.num_tokens)
        if len(scores) == 1:
            return Evaluation(data, seed, *counts, scores[0], answers=self.answers)
        same = sum(a == b for a, b in zip(*said, strict=True)) / len(self.answers) if self.answers else None
        num_tokens = max(1, self.num_tokens)
        return Evaluation(
            data, seed, *counts, *scores, same, self.same_tokens / num_tokens, self.kl / num_tokens, self.answers
        )


def _log_probabilities(model: nn.Module, batch: QuestionBatch) -> Tensor:
    """Return the log probabilities, [targets, vocabulary] float32, that predict the target tokens of a batch."""
    before = batch.targets.roll(-1, dims=1)  # token t is predicted at t − 1
    inputs = _on(model, batch.whole)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:  # logits of whole prompts can be gigabytes
        kept = before.any(0).nonzero().squeeze(1)
        inputs["logits_to_keep"], before = kept.to(model.device), before[:, kept]
    logits = model(**inputs).logits
    return logits[before.to(logits.device)].float().log_softmax(-1)


def _greedy(model: nn.Module, encoder: ChatEncoder, batch: QuestionBatch, max_new_tokens: int) -> list[str]:
    """Return the greedy answers to a batch's questions."""
    inputs = _on(model, batch.prompts)
    tokenizer = encoder.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, pad_token_id=pad)
    length = inputs["input_ids"].shape[1]
    if torch.equal(out[:, :length], inputs["input_ids"]):  # generation from embeddings returns the answer alone
        out = out[:, length:]
    return [text.strip() for text in tokenizer.batch_decode(out, skip_special_tokens=True)]


def _on(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return inputs on the device of a model, pixel values in its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }
