"""Calibration samples that the full-precision model writes itself, continuing the given ones.

Distillation of a whole model is limited by its data, and what a model writes after the beginning of a given text is more data of
the same domain. A written sample has the shape of the given one that it continues: its beginning, and every key of the processed
batch beside the tokens, are the given ones.

What is kept:

- of a text, 32 to 128 tokens, less than half of it; or only what all given texts begin with, the opening of a chat: then the
  model chooses what the text is about;
- of a sample with images, video or audio, everything up to the last of their positions, and a random part of the text after it.

Each next token is drawn from the model's own distribution (temperature 1, nothing cut off), up to the length of the given sample.
A sample whose replaced part holds end tokens (the turns of a chat) ends at as many of them and is padded after; one without (a
passage) gets none.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ..calibration import PADDING, TEXT, CalibrationBatch, media_modality
from ..machine.bar import Bar
from ..machine.limits import SampleLimit
from ..machine.placement import Placement, fits_whole
from ..passes.tracing import model_inputs

logger = logging.getLogger(__name__)

KEPT_OF_TEXT = (32, 128)
"""Fewest and most tokens of a text that are kept, where they are less than half of it."""
OPENED_BUILTIN = 0.7
"""Part of the texts written after built-in samples that keep only the opening of a chat: those samples are about few subjects."""
MOST_AT_ONCE, MOST_AT_ONCE_CPU = 1280, 32
"""Samples written side by side, before memory runs out."""
_MADE_ANEW = ("attention_mask", "position_ids", "labels")
_OF_TEXT = {f"{name}_token_id" for name in ("bos", "eos", "pad", "sep", "cls", "unk", "decoder_start", "forced_bos")}


def why_not_written(model: nn.Module) -> str | None:
    """Return why a model cannot continue its calibration samples; None if it can."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder, which answers its input and does not continue it"
    if not callable(getattr(model, "generate", None)) or not model.can_generate():
        return f"{name} cannot generate text (it has no language model head)"
    return None


def writes_well(model: nn.Module, device: torch.device) -> bool:
    """Tell whether a model can write many samples in little time: an accelerator has all of it, or room for it."""
    return device.type != "cpu" and why_not_written(model) is None and fits_whole(model, device)


def most_at_once(device: str) -> int:
    """Return how many samples are written side by side on a kind of device."""
    return MOST_AT_ONCE_CPU if device == "cpu" else MOST_AT_ONCE


def write_samples(
    model: nn.Module,
    batches: Sequence[CalibrationBatch],
    count: int,
    seed: int = 0,
    bar: Bar | None = None,
    opened: float = 0.0,
) -> list[CalibrationBatch]:
    """Let `model` continue beginnings of given samples, where its weights are; the caller's random numbers stay as they are.

    Args:
        model: with its dense weights, in evaluation mode, in memory or offloaded. A model in RAM writes on the CPU.
        batches: given samples. They are taken in random order, and again with other beginnings once all are used.
        count: samples to write. Batches with images stay whole, so it may be a few more.
        seed: of the beginnings and of what is drawn.
        bar: is told how many are written.
        opened: part of the texts of which nothing is kept but what all given ones begin with.
    Returns:
        Batches like the given ones (a last one without images may have fewer rows), in the order in which these were drawn, with
        new "input_ids" and, where a sample ended early, new "attention_mask" and modality.
    Raises:
        ValueError: the model cannot continue text, or there are no batches.
        RuntimeError: memory does not suffice for one batch.
    """
    if count < 1:
        return []
    if reason := why_not_written(model):
        raise ValueError(f"no samples can be written by the model: {reason}; set `written_samples=0`")
    if not batches:
        raise ValueError("`batches` must hold the samples to continue, got none")
    start = time.perf_counter()
    vocabulary = _Vocabulary.of(model)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    opening = _opening(batches) if opened else 0
    drawn = _draw(batches, count, generator)
    begun = [_begin(batch, vocabulary, generator, opening, opened) for batch in drawn]
    device = Placement(model).input_device
    _warn_of_place(device)
    written: list[CalibrationBatch | None] = [None] * len(begun)
    limit = SampleLimit()
    limit.samples = most_at_once(device.type)
    with (bar or Bar()).steps(sum(b.rows for b in begun)) as progress:
        for todo in _alike(begun):
            while todo:
                largest = sum(begun[i].rows for i in _first(todo, begun, limit.samples))

                def work(todo: list[int] = todo) -> tuple[list[int], list[CalibrationBatch]]:
                    own = _first(todo, begun, limit.samples)
                    return own, _write(model, [begun[i] for i in own], vocabulary, device, (seed, own[0]))

                own, done = limit.retry("writing samples", largest, work)
                for i, batch in zip(own, done, strict=True):
                    written[i] = batch
                    progress.update(begun[i].rows)
                todo = todo[len(own) :]
    _log(begun, written, time.perf_counter() - start)
    return written


@dataclass(frozen=True)
class _Vocabulary:
    """Special tokens of a model.

    Attributes:
        ends: tokens that end a turn or a text.
        never: tokens that stand for images and the like, and padding; no written text holds them.
        padding: what fills a sample after its end.
    """

    ends: list[int]
    never: list[int]
    padding: int

    @classmethod
    def of(cls, model: nn.Module) -> _Vocabulary:
        places = (getattr(model, "generation_config", None), model.config, model.config.get_text_config())
        ends = {i for place in places for i in _ids(getattr(place, "eos_token_id", None))}
        pads = [i for place in places for i in _ids(getattr(place, "pad_token_id", None))]
        never = (_media_tokens(model.config) | set(pads)) - ends
        return cls(sorted(ends), sorted(never), next(iter(pads), min(ends, default=0)))


def _ids(value: Any) -> list[int]:
    """Return the token ids of a config's field that holds none, one or several."""
    if isinstance(value, Tensor):
        value = value.flatten().tolist()
    listed = value if isinstance(value, (list, tuple)) else [value]
    return [i for i in listed if isinstance(i, int) and i >= 0]


def _media_tokens(config: Any) -> set[int]:
    """Return the tokens that a config names beside those of text: placeholders of images and the marks around them."""
    names = {n for n in vars(config) if n.endswith(("_token_id", "_token_index")) and n not in _OF_TEXT}
    parts = [getattr(config, key, None) for key in getattr(config, "sub_configs", {})]
    own = {i for name in names for i in _ids(getattr(config, name))}
    return own.union(*(_media_tokens(part) for part in parts if part is not None))


@dataclass(frozen=True)
class _Begun:
    """A given batch of which beginnings are kept.

    Attributes:
        order: [rows, length] positions of each row, those with tokens first.
        lengths, kept: [rows] tokens of each sample, and how many of them stay.
        ends: [rows] end tokens among those that do not.
    """

    batch: CalibrationBatch
    order: Tensor
    lengths: Tensor
    kept: Tensor
    ends: Tensor

    @property
    def rows(self) -> int:
        return len(self.kept)

    @property
    def tokenwise(self) -> list[str]:
        """Keys with one value, or several, at each position."""
        shape = self.batch.modality.shape
        return [k for k, v in self.batch.inputs.items() if isinstance(v, Tensor) and v.shape[:2] == shape]

    def form(self, number: int) -> tuple:
        """Return what batches share that can be joined: keys, and the shape of what belongs to their images."""
        others = {k: v for k, v in self.batch.inputs.items() if k not in self.tokenwise}
        if not all(isinstance(value, Tensor) and value.ndim for value in others.values()):
            return (number,)
        shapes = tuple((k, v.dtype, *v.shape[1:]) for k, v in sorted(others.items()))
        return (tuple(sorted(self.tokenwise)), shapes)


def _draw(batches: Sequence[CalibrationBatch], count: int, generator: torch.Generator) -> Iterator[CalibrationBatch]:
    """Yield batches in random order until they hold `count` samples; of a last one without images, the samples wanted."""
    while True:
        for i in torch.randperm(len(batches), generator=generator).tolist():
            batch = batches[i]
            if not _has_media(batch) and len(batch.modality) > count:
                first = {k: v[:count] if isinstance(v, Tensor) else v for k, v in batch.inputs.items()}
                batch = CalibrationBatch(first, batch.modality[:count])
            yield batch
            count -= len(batch.modality)
            if count <= 0:
                return


def _has_media(batch: CalibrationBatch) -> bool:
    return bool((batch.modality > TEXT).any()) or media_modality(batch.inputs) != TEXT


def _ordered(batch: CalibrationBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the positions [rows, length] of each row, those with tokens first; how many those are; modality and tokens so."""
    modality, ids = batch.modality.cpu(), batch.inputs["input_ids"].cpu()
    mask = batch.inputs.get("attention_mask")
    real = modality != PADDING if mask is None else mask.cpu() != 0
    order = (~real).int().argsort(dim=1, stable=True)
    return order, real.sum(1), modality.gather(1, order), ids.gather(1, order)


def _opening(batches: Sequence[CalibrationBatch]) -> int:
    """Return how many tokens all samples without images and the like have in common at their start."""
    texts = []
    for batch in batches:
        _, lengths, modality, ids = _ordered(batch)
        own = zip(modality, ids, lengths.tolist(), strict=True)
        texts += [row[:length].tolist() for kinds, row, length in own if not (kinds[:length] > TEXT).any()]
    alike = (len(set(tokens)) == 1 for tokens in zip(*texts, strict=False))
    return sum(itertools.takewhile(bool, alike))


def _begin(
    batch: CalibrationBatch, vocabulary: _Vocabulary, generator: torch.Generator, opening: int = 0, opened: float = 0.0
) -> _Begun:
    """Choose how much of each sample of a batch is kept: of a part `opened` of the texts, the tokens of the `opening`."""
    order, lengths, modality, ids = _ordered(batch)
    kept, ends = torch.zeros_like(lengths), torch.zeros_like(lengths)
    for row, length in enumerate(lengths.tolist()):
        media = (modality[row, :length] > TEXT).nonzero()
        first = int(media.max()) + 1 if len(media) else 0
        kept[row] = _kept(first, length, generator)
        if opening and not first and float(torch.rand((), generator=generator)) < opened:
            kept[row] = min(opening, max(1, length - 1))
        rest = ids[row, kept[row] : length]
        ends[row] = torch.isin(rest, torch.tensor(vocabulary.ends, dtype=rest.dtype)).sum()
    return _Begun(batch, order, lengths, kept, ends)


def _kept(after_media: int, length: int, generator: torch.Generator) -> int:
    """Return how many of a sample's `length` tokens stay; `after_media`: position after the last one of an image, or 0."""
    if after_media:
        low, high = after_media, length - 1
    else:
        low, high = (max(1, min(tokens, (length - 1) // 2)) for tokens in KEPT_OF_TEXT)
    return min(length, int(torch.randint(low, max(low, high) + 1, (), generator=generator)))


def _alike(begun: list[_Begun]) -> list[list[int]]:
    """Return the numbers of batches that can be joined, in lists; those whose beginnings are of like length together."""
    forms: dict[tuple, list[int]] = {}
    for number, batch in enumerate(begun):
        forms.setdefault(batch.form(number), []).append(number)
    return [sorted(own, key=lambda i: (int(begun[i].lengths.max()), i)) for own in forms.values()]


def _first(todo: list[int], begun: list[_Begun], rows: int) -> list[int]:
    """Return the first of `todo` that hold up to `rows` samples, at least one batch."""
    taken, total = [], 0
    for number in todo:
        total += begun[number].rows
        if taken and total > rows:
            break
        taken.append(number)
    return taken


@torch.no_grad()
def _write(
    model: nn.Module, begun: list[_Begun], vocabulary: _Vocabulary, device: torch.device, seed: tuple[int, int]
) -> list[CalibrationBatch]:
    """Continue the samples of batches that can be joined."""
    lengths, kept, ends = (torch.cat([getattr(b, name) for b in begun]) for name in ("lengths", "kept", "ends"))
    room, width = lengths - kept, int(kept.max())
    prefix = _prefixes(begun, width, vocabulary.padding)
    new = prefix["input_ids"].new_full((len(kept), 0), vocabulary.padding)
    if int(room.max()) > 0:
        sampling = _Sampling(vocabulary, ends == 0, seed)
        stopping = _Ends(vocabulary.ends, ends, room)
        with _plain_generation(model, int(room.max()), vocabulary.padding):
            out = model.generate(
                **model_inputs(model, prefix, device),
                logits_processor=LogitsProcessorList([sampling]),
                stopping_criteria=StoppingCriteriaList([stopping]),
            ).cpu()
        # generation from embeddings returns the new tokens alone
        with_prefix = out.shape[1] >= width and torch.equal(out[:, :width], prefix["input_ids"])
        new = out[:, width:] if with_prefix else out
    written, row = [], 0
    for batch in begun:
        written.append(_filled(batch, new[row : row + batch.rows], vocabulary))
        row += batch.rows
    return written


def _prefixes(begun: list[_Begun], width: int, padding: int) -> dict[str, Any]:
    """Return the kept beginnings of batches as one, padded on the left to `width` positions."""
    joined: dict[str, list[Tensor]] = {"attention_mask": []}
    for b in begun:
        place = b.kept[:, None] - width + torch.arange(width)  # [rows, width], below 0 for padding
        positions = b.order.gather(1, place.clamp(min=0))
        joined["attention_mask"].append((place >= 0).long())
        for key, value in b.batch.inputs.items():
            if key in _MADE_ANEW:
                continue
            if key in b.tokenwise:
                value = value.cpu()[torch.arange(b.rows)[:, None], positions]
                value[place < 0] = padding if key == "input_ids" else 0
            joined.setdefault(key, []).append(value)
    return {k: torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0] for k, parts in joined.items()}


def _filled(begun: _Begun, new: Tensor, vocabulary: _Vocabulary) -> CalibrationBatch:
    """Put the new tokens [rows, at most so many] into the places of those that were not kept."""
    inputs, modality = begun.batch.inputs, begun.batch.modality.clone()
    ids = inputs["input_ids"].clone()
    mask = inputs["attention_mask"].clone() if "attention_mask" in inputs else torch.ones_like(ids)
    for row in range(begun.rows):
        kept, length, ends = (int(x[row]) for x in (begun.kept, begun.lengths, begun.ends))
        tokens = new[row, : length - kept]
        if ends:
            at = torch.isin(tokens, torch.tensor(vocabulary.ends)).nonzero().flatten()
            tokens = tokens[: int(at[ends - 1]) + 1] if len(at) >= ends else tokens
        own = begun.order[row]
        ids[row, own[kept : kept + len(tokens)]] = tokens.to(ids)
        after = own[kept + len(tokens) : length]
        ids[row, after], mask[row, after], modality[row, after] = vocabulary.padding, 0, PADDING
    changed = {"input_ids": ids}
    if "attention_mask" in inputs or not mask.all():
        changed["attention_mask"] = mask
    if "labels" in inputs:
        labels = inputs["labels"]
        changed["labels"] = labels.where((labels == -100) | (mask == 0), ids).masked_fill(mask == 0, -100)
    return CalibrationBatch({**inputs, **changed}, modality)


class _Sampling(LogitsProcessor):
    """Make the largest logit the token that is drawn: logits plus Gumbel noise, from a generator of its own.

    Args:
        endless: [rows] whether no end token may be drawn.
    """

    def __init__(self, vocabulary: _Vocabulary, endless: Tensor, seed: tuple[int, int]):
        self._vocabulary, self._endless, self._seed = vocabulary, endless, (seed[0] * 1_000_003 + seed[1]) % 2**63
        self._generator: torch.Generator | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._generator is None:
            self._generator = torch.Generator(scores.device).manual_seed(self._seed)
            self._endless = self._endless.to(scores.device)
        size = scores.shape[-1]
        never, ends = ([i for i in ids if i < size] for ids in (self._vocabulary.never, self._vocabulary.ends))
        noise = torch.empty_like(scores).exponential_(generator=self._generator)
        drawn = scores - noise.log()
        drawn[:, never] = -torch.inf
        drawn[:, ends] = drawn[:, ends].masked_fill(self._endless[:, None], -torch.inf)
        return drawn


class _Ends(StoppingCriteria):
    """Stop once every row has its end tokens, or its length."""

    def __init__(self, ends: list[int], wanted: Tensor, room: Tensor):
        self._ends, self._wanted, self._room, self._steps, self._found = ends, wanted, room, 0, None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        last = input_ids[:, -1]
        if self._found is None:
            self._ends = torch.tensor(self._ends, device=last.device)
            self._found = torch.zeros_like(last)
            self._wanted, self._room = self._wanted.to(last.device), self._room.to(last.device)
        self._steps += 1
        self._found += torch.isin(last, self._ends)
        return ((self._wanted > 0) & (self._found >= self._wanted)) | (self._steps >= self._room)


@contextmanager
def _plain_generation(model: nn.Module, num_tokens: int, padding: int) -> Iterator[None]:
    """Leave the model's own generation settings aside: versions differ in how they mix them with what is asked for."""
    own = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, num_beams=1, use_cache=True, pad_token_id=padding
    )
    try:
        yield
    finally:
        model.generation_config = own


def _warn_of_place(device: torch.device) -> None:
    if device.type == "cpu" and torch.cuda.is_available():
        logger.warning(
            'the model writes samples on the CPU, where it is, which is slow; load it with `device_map="cuda"` if it fits, '
            "or set `written_samples=0`"
        )


def _log(begun: list[_Begun], written: list[CalibrationBatch], seconds: float) -> None:
    tokens = sum(int((w.modality != PADDING).sum() - b.kept.sum()) for b, w in zip(begun, written, strict=True))
    logger.info("the model wrote %d samples, %d tokens, in %.0f s", sum(b.rows for b in begun), tokens, seconds)
