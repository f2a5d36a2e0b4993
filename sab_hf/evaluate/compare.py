"""Score a model, and compare it with its original: right answers, perplexity, agreement, KL."""

from __future__ import annotations

import dataclasses
import inspect
import json
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
from ..machine.threads import free_threads
from ..notebook import html_text
from ..publish.report import finite
from ..spelling import check_misspelt
from .answering import Speed, elsewhere, greedy, measure_speed, on_device, open_model, training_off
from .examples import Example, example, has_picture
from .questions import Question, QuestionBatch, encode_questions, read_questions
from .scorers import SCORERS


@dataclass(frozen=True)
class Scores:
    """What one model scored.

    Attributes:
        metrics: scorer name → mean over the questions, 0 to 1; empty if the data has no answers.
        nll: nats per token of the right answers (what ends the turn included) and of passages, given all before it.
        speed: how fast it answers the first question; None if it was not measured.
    """

    metrics: dict[str, float]
    nll: float
    speed: Speed | None = field(default=None, compare=False)

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


@dataclass(frozen=True, repr=False)
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
        examples: the first questions with a picture, in the order of the seed.
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
    examples: list[Example] = field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, Any]:
        plain = dataclasses.asdict(self)
        plain["model"]["perplexity"] = self.model.perplexity
        if self.original:
            plain["original"]["perplexity"] = self.original.perplexity
        return plain

    def to_json(self) -> str:
        return json.dumps(finite(self.to_dict()), indent=2)

    def __repr__(self) -> str:
        metrics = "".join(f", {name.replace('_', ' ')} {value:.1%}" for name, value in self.model.metrics.items())
        kl = "" if self.kl is None else f", KL {self.kl:.4f}"
        return f"{type(self).__name__}({self.num_samples} samples{metrics}, {self.model.nll:.4f} nats per token{kl})"

    def _repr_html_(self) -> str:
        return html_text(str(self))

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
        if self.model.speed:
            for name, key in (("first token, ms", "first_token_ms"), ("further token, ms", "token_ms")):
                values = [getattr(column.speed, key) for column in columns if column.speed]
                lines.append(f"{name:<22}" + "".join(f"{value:>10.4g}" for value in values))
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
    num_examples: int = 0,
    speed: bool = True,
    **load_kwargs: Any,
) -> Evaluation:
    """Ask a model questions, and compare it with its original token by token. Greedy, in a fixed order.

    Both models are in memory at the same time; the same inputs go to both. On a CPU, as many threads compute as there are free
    cores.

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
        num_examples: most questions with pictures that are kept for card and report, which publish them.
        speed: whether to time one answer of each model as well, some seconds' work.
        load_kwargs: arguments of `from_pretrained`, where a path or id is given: `device_map`, `dtype`, `token`, …; `revision`
            and `subfolder` are those of `model` alone.
    Raises:
        ValueError: the data has none of the accepted forms, or the two models have different vocabularies.
        TypeError: an argument of this function is misspelt.
    """
    check_misspelt(load_kwargs, inspect.signature(evaluate).parameters, "evaluate()")
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    if num_examples < 0:
        raise ValueError(f"`num_examples` must be at least 0, got {num_examples}")
    check_seed(seed)
    model, processor = open_model(model, processor, load_kwargs)
    models = [model] if original is None else [model, open_model(original, processor, elsewhere(load_kwargs))[0]]
    scorers = SCORERS if scorers is None else scorers
    encoder = ChatEncoder(processor, max_image_pixels, allow_urls)
    questions = read_questions(data, num_samples, seed, with_images=not encoder.text_only)
    tally = _Tally(len(models))
    with (
        free_threads(model.device),
        torch.inference_mode(),
        borrowed(encoder.tokenizer),
        training_off(*models),
        tqdm(total=len(questions), desc="evaluating") as bar,
    ):
        for batch in encode_questions(questions, encoder, model.config, batch_size):
            tally.add_tokens([_log_probabilities(each, batch) for each in models], batch)
            if batch.prompts is not None:
                tally.add_answers([greedy(each, encoder, batch.prompts, max_new_tokens) for each in models], batch)
            bar.update(len(batch.questions))
        asked = next((question for question in questions if question.accepted), None)
        if speed and asked is not None:
            prompt = encoder([asked.prompt], reply=True)
            tally.speeds = [measure_speed(each, encoder, prompt) for each in models]
    name = str(data) if isinstance(data, (str, os.PathLike)) else "samples in memory"
    examples = tally.examples(questions, num_examples, scorers, allow_urls)
    return tally.result(name, seed, len(questions), scorers, examples)


class _Tally:
    """Sums over batches."""

    def __init__(self, num_models: int):
        self.nll, self.num_tokens = [0.0] * num_models, 0
        self.kl, self.same_tokens = 0.0, 0
        self.answers: list[Answer] = []
        self.asked: list[Question] = []
        self.speeds: list[Speed | None] = [None] * num_models

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
            self.asked.append(question)

    def examples(
        self, questions: list[Question], most: int, scorers: dict[str, Callable], allow_urls: bool
    ) -> list[Example]:
        """Return the first questions that show a picture, with what was answered."""
        scorer = next(iter(scorers.values()), None)
        said = {
            id(question): (answer.given, answer.given_by_original)
            for question, answer in zip(self.asked, self.answers, strict=True)
        }
        shown = [question for question in questions if scorer and question.accepted and has_picture(question)]
        return [example(question, *said[id(question)], scorer, allow_urls) for question in shown[:most]]

    def result(
        self, data: str, seed: int, num_samples: int, scorers: dict[str, Callable], examples: list[Example]
    ) -> Evaluation:
        said = [[(answer.given, answer.given_by_original)[i] for answer in self.answers] for i in range(len(self.nll))]
        scores = []
        for texts, nll, speed in zip(said, self.nll, self.speeds, strict=True):
            metrics = {
                name: sum(scorer(text, answer.accepted) for text, answer in zip(texts, self.answers, strict=True))
                / len(texts)
                for name, scorer in scorers.items()
                if texts
            }
            scores.append(Scores(metrics, nll / max(1, self.num_tokens), speed))
        counts = (num_samples, len(self.answers), self.num_tokens)
        if len(scores) == 1:
            return Evaluation(data, seed, *counts, scores[0], answers=self.answers, examples=examples)
        same = sum(a == b for a, b in zip(*said, strict=True)) / len(self.answers) if self.answers else None
        num_tokens = max(1, self.num_tokens)
        agreement = (same, self.same_tokens / num_tokens, self.kl / num_tokens)
        return Evaluation(data, seed, *counts, *scores, *agreement, self.answers, examples)


def _log_probabilities(model: nn.Module, batch: QuestionBatch) -> Tensor:
    """Return the log probabilities, [targets, vocabulary] float32, that predict the target tokens of a batch."""
    before = batch.targets.roll(-1, dims=1)  # token t is predicted at t − 1
    inputs = on_device(model, batch.whole)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:  # logits of whole prompts can be gigabytes
        kept = before.any(0).nonzero().squeeze(1)
        inputs["logits_to_keep"], before = kept.to(model.device), before[:, kept]
    logits = model(**inputs).logits
    return logits[before.to(logits.device)].float().log_softmax(-1)
