"""Score a vision-language model on the generated world: exact match of greedy answers, and nats per right answer token.

PYTHONPATH=examples python -m tiny_vlm.score examples/tiny_vlm/checkpoint
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from . import world
from .world import SKILLS, TEXT_SKILLS, VISUAL_SKILLS, Sample


@dataclass(frozen=True)
class Score:
    """What `evaluate` measured.

    accuracy: fraction of exact matches, by skill.
    nll: nats per answer token (the token that ends the turn included), by skill.
    counts: number of samples, by skill.
    mean_nll: nats per answer token over all samples.
    losses, tokens: nats of the right answer and its tokens, by sample.
    """

    accuracy: dict[str, float]
    nll: dict[str, float]
    counts: dict[str, int]
    mean_nll: float
    losses: list[float]
    tokens: list[int]

    @property
    def visual(self) -> float:
        """Return the mean accuracy over the visual skills that were asked for."""
        return _mean([self.accuracy[skill] for skill in VISUAL_SKILLS if skill in self.accuracy])

    @property
    def text(self) -> float:
        """Return the mean accuracy over the text-only skills that were asked for."""
        return _mean([self.accuracy[skill] for skill in TEXT_SKILLS if skill in self.accuracy])

    def __str__(self) -> str:
        """Return the table as Markdown."""
        lines = ["| skill | exact match | nats/answer token | samples |", "|---|---|---|---|"]
        for skill, accuracy in self.accuracy.items():
            lines.append(f"| {skill} | {accuracy:.1%} | {self.nll[skill]:.3g} | {self.counts[skill]} |")
        for name, mean in (("visual", self.visual), ("text only", self.text)):
            if mean == mean:  # not nan: some skill of the kind was asked for
                lines.append(f"| **mean, {name}** | {mean:.1%} | | |")
        lines.append(f"| **all answer tokens** | | {self.mean_nll:.3g} | {sum(self.counts.values())} |")
        return "\n".join(lines)


@torch.inference_mode()
def evaluate(model, processor, samples: Sequence[Sample], batch_size: int = 64) -> Score:
    """Ask `model` the last question of every sample, on the device and in the dtype that it is in.

    model: any image-text-to-text model of transformers.
    processor: its processor, with a chat template.
    samples: what to ask, as from `world.samples`.
    batch_size: samples a forward pass; answers do not depend on it, up to rounding.

    Raises ValueError if `samples` is empty.
    """
    if not samples:
        raise ValueError("`samples` must hold at least one sample, got none")
    was_training = model.training
    model.eval()
    right = [False] * len(samples)
    nll = [0.0] * len(samples)
    tokens = [0] * len(samples)
    # Samples with and without an image go apart, and like lengths together: less padding.
    order = sorted(range(len(samples)), key=lambda i: (samples[i].image is None, len(samples[i].turns[-1][0])))
    with_image = [i for i in order if samples[i].image is not None]
    without = [i for i in order if samples[i].image is None]
    for group in (with_image, without):
        for start in range(0, len(group), batch_size):
            rows = group[start : start + batch_size]
            batch = [samples[i] for i in rows]
            prompts = _encode(model, processor, batch, with_answer=False)
            whole = _encode(model, processor, batch, with_answer=True)
            num_answer = whole["attention_mask"].sum(-1) - prompts["attention_mask"].sum(-1)  # [B]
            answers = _greedy(model, processor, prompts, int(num_answer.max()))
            losses = _answer_nll(model, whole, num_answer)
            for row, answer, loss, num in zip(rows, answers, losses, num_answer.tolist(), strict=True):
                right[row] = answer.strip() == samples[row].answer
                nll[row], tokens[row] = loss, num
    model.train(was_training)

    by_skill = {skill: [i for i, s in enumerate(samples) if s.skill == skill] for skill in SKILLS}
    by_skill = {skill: rows for skill, rows in by_skill.items() if rows}
    return Score(
        accuracy={skill: _mean([right[i] for i in rows]) for skill, rows in by_skill.items()},
        nll={skill: sum(nll[i] for i in rows) / sum(tokens[i] for i in rows) for skill, rows in by_skill.items()},
        counts={skill: len(rows) for skill, rows in by_skill.items()},
        mean_nll=sum(nll) / sum(tokens),
        losses=nll,
        tokens=tokens,
    )


def _mean(values):
    return sum(values) / len(values) if values else float("nan")


def _encode(model, processor, batch, with_answer):
    conversations = [sample.messages(with_answer) for sample in batch]
    texts = processor.apply_chat_template(conversations, tokenize=False, add_generation_prompt=not with_answer)
    images = [sample.image for sample in batch if sample.image is not None] or None
    # Left padding: every answer then ends, and every generation begins, at the right edge.
    inputs = processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt")
    return inputs.to(model.device, dtype=model.dtype)


def _greedy(model, processor, prompts, max_new_tokens):
    out = model.generate(**prompts, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
    return processor.batch_decode(out[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)


def _answer_nll(model, whole, num_answer):
    """Return the summed negative log-likelihood of each row's last `num_answer` tokens, in nats."""
    most = int(num_answer.max())
    logits = model(**whole, logits_to_keep=most + 1).logits[:, -most - 1 : -1].float()  # [B, most, vocabulary]
    targets = whole["input_ids"][:, -most:]
    loss = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]  # [B, most]
    place = torch.arange(most, 0, -1, device=loss.device)  # distance from the right edge
    return (loss * (place <= num_answer[:, None])).sum(-1).tolist()


def main() -> None:
    """Run the module as a script."""
    parser = argparse.ArgumentParser(
        prog="python -m tiny_vlm.score", description="Score a checkpoint of the tiny model."
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--samples", type=int, default=2200)
    parser.add_argument("--seed", default="held-out")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(args.checkpoint, dtype=torch.float32).to(device)
    processor = AutoProcessor.from_pretrained(args.checkpoint)
    print(evaluate(model, processor, world.samples(args.samples, args.seed)))


if __name__ == "__main__":
    main()
