"""The first screen of a report: is the model still good, how big is it, how fast is it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ..units import size_in_words

GOOD, BAD, NEUTRAL = "good", "bad", ""
_SURE = 1.96
"""Standard errors on both sides of a difference that hold 95 % of those that chance makes."""
_EVALUATE = ("sab-hf eval CHECKPOINT --original ORIGINAL --output evaluation.json",)
_ON_CARD = "sab-hf card CHECKPOINT --evaluation evaluation.json"


class Verdict(NamedTuple):
    """One question that a reader has, with the answer.

    Attributes:
        question: in words.
        tone: GOOD, BAD or NEUTRAL; said by `sign` and words as well.
        sign: what stands before the figure; "": nothing.
        figure: the answer in a few letters.
        sentences: the answer in words.
        commands: what to run where there is no answer yet.
    """

    question: str
    tone: str
    sign: str
    figure: str
    sentences: tuple[str, ...]
    commands: tuple[str, ...] = ()


def verdicts(summary: dict[str, Any]) -> list[Verdict]:
    """Return what the first screen says of a model.

    Args:
        summary: result of `summary.summarize`, or the JSON report of a checkpoint.
    """
    return [_still_good(summary), _how_big(summary), _how_fast(summary)]


def _still_good(summary: dict[str, Any]) -> Verdict:
    question = "Is it still good?"
    told = [
        verdict
        for verdict in (_by_tasks(question, summary.get("tasks")), _by_answers(question, summary["evaluation"]))
        if verdict
    ]
    if not told:
        words = ("No evaluation was run when this report was written. These two commands make one:",)
        return Verdict(question, NEUTRAL, "?", "not measured", words, (*_EVALUATE, _ON_CARD))
    return told[0]


def _by_tasks(question: str, found: dict[str, Any] | None) -> Verdict | None:
    """Answer by the scores of tasks: the worst of them, seen against its error, decides."""
    scores = [score for score in (found or {}).get("scores", []) if score["model"] is not None]
    if not scores:
        return None
    both = [score for score in scores if score.get("original")]
    if not both:
        first = scores[0]
        words = (f"{first['metric'].replace('_', ' ')} of {first['task']}; the original was not asked.",)
        return Verdict(question, NEUTRAL, "", f"{first['model']:.4g}", words)
    kept = sum(score["model"] / score["original"] for score in both) / len(both)
    worse = [score["task"] for score in both if _is_worse(score)]
    average = f"of the original's scores are kept, averaged over {_count(len(both), 'measure')}"
    if not worse:
        return Verdict(question, GOOD, "✓", f"{kept:.1%}", (f"{average}; none is lower by more than chance.",))
    names = ", ".join(dict.fromkeys(worse))
    return Verdict(question, BAD, "▼", f"{kept:.1%}", (f"{average}.", f"Lower by more than chance: {names}."))


def _is_worse(score: dict[str, Any]) -> bool:
    """Whether a model is worse in a score than its original by more than chance makes."""
    loss = score["original"] - score["model"]
    errors = [score.get(name) or 0.0 for name in ("model_error", "original_error")]
    return (loss if score.get("higher_is_better", True) else -loss) > _SURE * math.hypot(*errors)


def _by_answers(question: str, found: dict[str, Any] | None) -> Verdict | None:
    """Answer by the questions of `sab_hf.evaluate`: the share of right answers by the first scorer, or nats per token."""
    if not found:
        return None
    model, original = found["model"], found.get("original") or {}
    name, right = next(((n, v) for n, v in model["metrics"].items() if v is not None), (None, None))
    if name is None:
        return _by_tokens(question, model, original)
    count = found.get("num_questions") or found["num_samples"]
    figure, measure = f"{right:.1%}", f"{name.replace('_', ' ')}, {_count(count, 'question')}"
    before = (original.get("metrics") or {}).get(name)
    if before is None:
        return Verdict(question, NEUTRAL, "", f"{figure} right", (f"{measure}; the original was not asked.",))
    said = f"right answers ({measure}); the original gives {before:.1%}."
    same = found.get("answer_agreement")
    also = () if same is None else (f"It answers {same:.1%} of the questions as the original does.",)
    error = _SURE * math.sqrt(sum(max(0.0, p * (1 - p)) for p in (right, before)) / max(1, count))
    if before - right <= error:
        chance = f"No loss beyond chance was found (±{100 * error:.1f} points)."
        return Verdict(question, GOOD, "✓", figure, (said, chance, *also))
    loss = f"It lost {100 * (before - right):.1f} points (±{100 * error:.1f})."
    return Verdict(question, BAD, "▼", figure, (said, loss, *also))


def _by_tokens(question: str, model: dict[str, Any], original: dict[str, Any]) -> Verdict | None:
    if model["nll"] is None:
        return None
    figure = f"{model['nll']:.3f} nats"
    if original.get("nll") is None:
        return Verdict(question, NEUTRAL, "", figure, ("per token of text, given all before it; lower is better.",))
    words = f"per token of text; the original needs {original['nll']:.3f}. Lower is better."
    return Verdict(question, NEUTRAL, "", figure, (words,))


def _how_big(summary: dict[str, Any]) -> Verdict:
    whole, packed = summary["bytes_at_16_bits"], summary["total_bytes"]
    words = (
        f"the whole checkpoint; with 16-bit weights it is {size_in_words(whole)}, {whole / packed:.1f} times that.",
        f"{summary['bits']:.3f} bits for each binarized weight, everything counted.",
    )
    return Verdict("How big is it?", NEUTRAL, "", size_in_words(packed), words)


def _how_fast(summary: dict[str, Any]) -> Verdict:
    question, found = "How fast is it?", summary["evaluation"] or {}
    speed = (found.get("model") or {}).get("speed")
    if not speed or not speed["token_ms"]:
        told = "No speed was measured when this report was written. An evaluation measures it:"
        return Verdict(question, NEUTRAL, "?", "not measured", (told,), (*_EVALUATE, _ON_CARD))
    words = [f"{speed['token_ms']:.3g} ms a token, one answer at a time, on {speed['device']}."]
    before = (found.get("original") or {}).get("speed")
    if before and before["token_ms"]:
        words[0] += f" The original takes {before['token_ms']:.3g} ms ({before['token_ms'] / speed['token_ms']:.1f}×)."
    words.append(
        f"{speed['first_token_ms']:.3g} ms to the first token after a prompt of {_count(speed['prompt_tokens'], 'token')}"
        + (f"; the original {before['first_token_ms']:.3g} ms." if before else ".")
    )
    return Verdict(question, NEUTRAL, "", f"{1000 / speed['token_ms']:.3g} tokens/s", tuple(words))


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + ("s" if number != 1 else "")
