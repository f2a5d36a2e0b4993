"""What a model is measured by on the generated world, and the samples that it is calibrated on."""

import math
from pathlib import Path
from typing import Any

import torch
from tiny_vlm import score, world
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

HELD_OUT = "held-out"  # the seed of the questions; calibration has seeds of its own


class RecordingProcessor:
    """A processor that remembers the answers it decoded, in their order: `score.evaluate` returns only how many are right."""

    def __init__(self, processor: Any):
        self._processor, self.answers = processor, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._processor(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        texts = self._processor.batch_decode(*args, **kwargs)
        self.answers += texts
        return texts


def load(folder: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Any]:
    """Return the model of a folder, in evaluation mode, and its processor."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"`--model` must be a folder with a trained model, got {folder}; examples/tiny_vlm/train.py makes one"
        )
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(device).eval()
    return model, AutoProcessor.from_pretrained(folder)


def stored_dtype_bits(folder: str) -> int:
    """Return the bits/weight of the folder's own dtype."""
    dtype = AutoConfig.from_pretrained(folder).dtype
    return torch.finfo(dtype or torch.float32).bits


def calibration_samples(count: int, seed: int) -> list[list[dict]]:
    """Return conversations with their answers, every skill in turn; 8 of 11 have an image."""
    return [sample.messages(True) for sample in world.samples(count, f"calibration/{seed}")]


def measure(model: torch.nn.Module, processor: Any, questions: int, batch_size: int) -> dict[str, Any]:
    """Ask held-out questions and return a row's measures.

    nll: nats per answer token, over all skills; nll_by_skill, accuracy: by skill (exact match, 0 to 1)
    visual, text: mean accuracy over the visual and over the text-only skills
    text_nll, text_perplexity: over every token after the first of the text-only samples, questions included
    answers: the greedy answers, in an order that depends on questions and batch size only
    losses, tokens: nats of the right answer and its tokens, by question
    """
    samples = world.samples(questions, HELD_OUT)
    recorder = RecordingProcessor(processor)
    result = score.evaluate(model, recorder, samples, batch_size)
    text_nll = full_text_nll(model, processor, [s for s in samples if s.image is None], batch_size)
    return {
        "nll": result.mean_nll,
        "visual": result.visual,
        "text": result.text,
        "text_nll": text_nll,
        "text_perplexity": math.exp(text_nll) if text_nll < 700 else math.inf,
        "accuracy": result.accuracy,
        "nll_by_skill": result.nll,
        "answers": recorder.answers,
        "losses": result.losses,
        "tokens": result.tokens,
    }


@torch.inference_mode()
def full_text_nll(model: torch.nn.Module, processor: Any, samples: list[world.Sample], batch_size: int) -> float:
    """Return nats per token over the whole text of text-only samples, teacher-forced, every token after the first."""
    total, count = 0.0, 0
    for start in range(0, len(samples), batch_size):
        conversations = [sample.messages(True) for sample in samples[start : start + batch_size]]
        texts = processor.apply_chat_template(conversations, tokenize=False)
        inputs = processor(text=texts, padding=True, padding_side="right", return_tensors="pt").to(model.device)
        logits = model(**inputs).logits[:, :-1].float()
        targets, mask = inputs["input_ids"][:, 1:], inputs["attention_mask"][:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        total += float((losses * mask.flatten()).sum())
        count += int(mask.sum())
    return total / count if count else math.nan
