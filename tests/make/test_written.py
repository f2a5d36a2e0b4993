"""Samples that the model writes itself: what is kept, what is drawn, where they end."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from helpers import END, IMAGE, PAD, VOCAB_SIZE, build_llama, build_llava, build_processor, build_samples
from torch import Tensor
from transformers import LlamaModel, T5Config, T5ForConditionalGeneration

from sab_hf.calibration import PADDING, TEXT, CalibrationBatch, prepare_calibration, token_modality
from sab_hf.make import written
from sab_hf.make.written import why_not_written, write_samples


def text_batch(lengths: list[int], side: str = "right", ends: tuple[int, ...] = (), seed: int = 0) -> CalibrationBatch:
    """Return random bytes of some lengths, padded on one side; `ends`: places of end tokens in each row, from its end."""
    ids = torch.full((len(lengths), max(lengths)), PAD)
    mask = torch.zeros_like(ids)
    generator = torch.Generator().manual_seed(seed)
    for row, length in enumerate(lengths):
        own = slice(0, length) if side == "right" else slice(max(lengths) - length, None)
        ids[row, own] = torch.randint(0, 256, (length,), generator=generator)
        for place in ends:
            ids[row, own.start + length - place] = END
        mask[row, own] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    return CalibrationBatch(inputs, token_modality(inputs, SimpleNamespace()))


def image_batches(batch_size: int = 3) -> list[CalibrationBatch]:
    model = build_llava()
    return prepare_calibration(
        build_samples(), build_processor(), model.config, num_samples=6, batch_size=batch_size
    ).batches


def rows_of(batch: CalibrationBatch) -> list[Tensor]:
    """Return the tokens of each row without padding."""
    return [ids[mask != 0] for ids, mask in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True)]


def shared(a: Tensor, b: Tensor) -> int:
    """Return how many tokens two rows share at their start."""
    size = min(len(a), len(b))
    different = (a[:size] != b[:size]).nonzero()
    return int(different[0]) if len(different) else size


def test_only_models_on_an_accelerator_that_generate_write_by_default(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr("sab_hf.machine.placement.free_memory", lambda _: 2**50)
    assert written.writes_well(build_llama(), gpu)
    assert not written.writes_well(build_llama(), torch.device("cpu"))
    assert not written.writes_well(LlamaModel(build_llama().config), gpu)
    monkeypatch.setattr("sab_hf.machine.placement.free_memory", lambda _: 1000)
    assert not written.writes_well(build_llama(), gpu)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_text_keeps_its_beginning_its_length_and_its_padding(side):
    given = text_batch([150, 90, 40, 5], side)
    (batch,) = write_samples(build_llama(), [given], 4, seed=3)
    assert torch.equal(batch.inputs["attention_mask"], given.inputs["attention_mask"])
    assert torch.equal(batch.modality, given.modality)
    assert batch.modality.dtype == torch.int8
    assert batch.inputs["input_ids"].dtype == given.inputs["input_ids"].dtype
    padding = given.inputs["attention_mask"] == 0
    assert (batch.inputs["input_ids"][padding] == PAD).all()
    for old, new, (low, high) in zip(
        rows_of(given), rows_of(batch), ((32, 74), (32, 44), (19, 19), (2, 2)), strict=True
    ):
        assert len(new) == len(old)
        assert low <= shared(old, new) <= high + 2  # a drawn token is the given one, once in 264
        assert not torch.isin(new, torch.tensor([END, PAD])).any()


def test_of_a_long_text_32_to_128_tokens_are_kept_and_after_an_image_some():
    generator = torch.Generator().manual_seed(0)
    drawn = [written._kept(0, 1000, generator) for _ in range(2000)]
    assert (min(drawn), max(drawn)) == (32, 128)
    assert {written._kept(10, 14, generator) for _ in range(200)} == {10, 11, 12, 13}
    assert {written._kept(10, 10, generator), written._kept(0, 1, generator)} == {10, 1}


def test_a_part_of_the_texts_keeps_only_what_all_begin_with():
    given = [
        text_batch([60, 50, 40], "left", ends=(30, 1)),
        text_batch([45, 55], ends=(20, 1), seed=1),
        *image_batches(),
    ]
    for batch in given[:2]:
        for row, mask in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True):
            row[mask.nonzero()[:5, 0]] = torch.tensor([7, 8, 9, 7, 8])
    vocabulary, opening = written._Vocabulary([END], [], PAD), written._opening(given)
    assert opening == 5
    kept = {}
    for opened in (0.0, 0.7, 1.0):
        generator = torch.Generator().manual_seed(0)
        begun = [written._begin(batch, vocabulary, generator, opening, opened) for batch in given * 30]
        texts = [b for b in begun if not written._has_media(b.batch)]
        kept[opened] = torch.cat([b.kept for b in texts])
        assert all((b.kept > 5).all() for b in begun if written._has_media(b.batch))
    assert kept[0.0].min() > 5
    assert (kept[1.0] == 5).all()
    assert 0.6 < (kept[0.7] == 5).float().mean() < 0.8
    assert all((b.ends == 2).all() for b in texts)  # both turns are written anew


def test_texts_that_begin_with_different_tokens_have_no_opening():
    given = [text_batch([60, 50]), text_batch([45], seed=1)]
    assert written._opening(given) == 0
    one, other = (write_samples(build_llama(), given, 3, seed=1, opened=opened) for opened in (0.0, 0.7))
    assert all(torch.equal(a.inputs["input_ids"], b.inputs["input_ids"]) for a, b in zip(one, other, strict=True))


def test_the_seed_decides_and_the_random_numbers_of_the_caller_stay():
    model, given = build_llama(), [text_batch([24, 20]), text_batch([18], seed=1)]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (write_samples(model, given, 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a.inputs["input_ids"], b.inputs["input_ids"]) for a, b in zip(one, same, strict=True))
    assert any(
        a.modality.shape != b.modality.shape or not torch.equal(a.inputs["input_ids"], b.inputs["input_ids"])
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("count", [0, 1, 3, 4, 9])
def test_as_many_samples_as_asked_for_and_other_ones_when_a_sample_comes_again(count):
    batches = write_samples(build_llama(), [text_batch([24, 20]), text_batch([22, 12], seed=1)], count)
    assert sum(len(batch.modality) for batch in batches) == count
    rows = [tuple(row.tolist()) for batch in batches for row in rows_of(batch)]
    assert len(set(rows)) == count


def test_tokens_are_drawn_from_the_distribution_of_the_model():
    model = build_llama(initializer_range=0.05)
    given = text_batch([3])
    given = CalibrationBatch({k: v.repeat(3_000, 1) for k, v in given.inputs.items()}, given.modality.repeat(3_000, 1))
    model.generation_config.update(temperature=0.1, top_k=1, do_sample=True, repetition_penalty=5.0)
    settings = model.generation_config
    (batch,) = write_samples(model, [given], 3_000)
    assert model.generation_config is settings
    with torch.no_grad():
        p = model(input_ids=given.inputs["input_ids"][:1, :1]).logits[0, 0].float()
    p[[PAD, END]] = -torch.inf  # padding and, in a passage, the end are never written
    counts = torch.bincount(batch.inputs["input_ids"][:, 1], minlength=VOCAB_SIZE) / 3_000
    p = p.softmax(-1)
    assert ((counts - p).abs() <= 5 * (p * (1 - p) / 3_000).sqrt() + 1e-9).all()


def biased(model, token: int, chance: float):
    """Make a model write one token with a chance that does not depend on the text."""
    weight = torch.zeros_like(model.lm_head.weight)
    model.lm_head = torch.nn.Linear(weight.shape[1], weight.shape[0])
    torch.nn.init.zeros_(model.lm_head.weight)
    torch.nn.init.zeros_(model.lm_head.bias)
    with torch.no_grad():
        model.lm_head.bias[token] = torch.tensor(chance / (1 - chance) * (weight.shape[0] - 1)).log()
    return model


def test_a_chat_ends_where_it_has_its_turns_and_a_passage_goes_on():
    model = biased(build_llama(), END, 0.2)
    chat, passage = text_batch([60] * 8, ends=(1, 12)), text_batch([60] * 8, seed=1)
    passage_ids = passage.inputs["input_ids"]
    by_first = {int(b.inputs["input_ids"][0, 0]): b for b in write_samples(model, [chat, passage], 16)}
    ended = by_first[int(chat.inputs["input_ids"][0, 0])]
    went_on = by_first[int(passage_ids[0, 0])]
    assert (went_on.modality == TEXT).all()
    assert not (went_on.inputs["input_ids"] == END).any()
    lengths = (ended.modality != PADDING).sum(1)
    assert (lengths < 60).any()
    for row, length in enumerate(lengths.tolist()):
        ids, mask = ended.inputs["input_ids"][row], ended.inputs["attention_mask"][row]
        assert mask.tolist() == [1] * length + [0] * (60 - length)
        assert (ids[length:] == PAD).all()
        if length < 60:
            assert ids[length - 1] == END
            assert int((ids[:length] == END).sum()) == 2
        else:
            assert int((ids == END).sum()) <= 2


def test_a_batch_without_a_mask_gets_one_where_a_sample_ends_early():
    model, given = biased(build_llama(), END, 0.5), text_batch([40] * 4, ends=(1,))
    bare = CalibrationBatch({"input_ids": given.inputs["input_ids"]}, given.modality)
    (batch,) = write_samples(model, [bare], 4)
    assert torch.equal(batch.inputs["attention_mask"] == 0, batch.modality == PADDING)
    assert (batch.modality == PADDING).any()


def test_samples_with_images_keep_everything_up_to_them():
    model = biased(build_llava(), IMAGE, 0.9)  # would like to write images
    given = image_batches()
    batches = write_samples(model, given, 6, seed=1)
    assert sum(len(batch.modality) for batch in batches) == 6
    pixels = {tuple(b.inputs["pixel_values"].flatten()[:40].tolist()): b for b in given}
    for batch in batches:
        source = pixels[tuple(batch.inputs["pixel_values"].flatten()[:40].tolist())]
        assert batch.inputs.keys() == source.inputs.keys()
        assert torch.equal(batch.inputs["pixel_values"], source.inputs["pixel_values"])
        kinds = batch.modality.masked_fill(batch.modality == PADDING, TEXT)
        assert torch.equal(kinds, source.modality.masked_fill(source.modality == PADDING, TEXT))
        assert torch.equal(batch.modality == PADDING, batch.inputs["attention_mask"] == 0)
        for old, new in zip(rows_of(source), rows_of(batch), strict=True):
            last = int((old == IMAGE).nonzero().max())
            assert torch.equal(old[: last + 1], new[: last + 1])
            assert len(new) <= len(old)
        assert model(**batch.inputs).logits.isfinite().all()
    assert any(not torch.equal(b.inputs["input_ids"], pixels[k].inputs["input_ids"]) for k in pixels for b in batches)


def test_images_and_texts_of_one_set_are_written_in_the_order_drawn(monkeypatch):
    given = [*image_batches(2), text_batch([60, 50]), text_batch([64, 40], seed=1)]
    calls = []
    model = build_llava()
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **kw: calls.append(len(kw["input_ids"])) or generate(**kw))
    batches = write_samples(model, given, 10, seed=4)
    assert sorted(calls) == [4, 6]  # batches of one form side by side
    drawn = list(written._draw(given, 10, torch.Generator().manual_seed(4)))
    assert [b.modality.shape for b in batches] == [b.modality.shape for b in drawn]
    assert [("pixel_values" in b.inputs) for b in batches] == [("pixel_values" in b.inputs) for b in drawn]


def test_side_by_side_as_many_as_memory_has_room_for(monkeypatch, caplog):
    given = [text_batch([30, 28], seed=seed) for seed in range(4)]
    model, sizes = build_llama(), []
    generate = model.generate

    def limited(**kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError("planted")
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", limited)
    monkeypatch.setattr(written, "MOST_AT_ONCE_CPU", 8)
    with caplog.at_level(logging.WARNING):
        batches = write_samples(model, given, 8)
    assert sizes == [8, 4, 4]
    assert sum(len(batch.modality) for batch in batches) == 8
    assert "4 samples at once" in caplog.text


def test_labels_follow_the_tokens():
    given = text_batch([20, 16])
    labels = given.inputs["input_ids"].masked_fill(given.inputs["attention_mask"] == 0, -100)
    (batch,) = write_samples(build_llama(), [CalibrationBatch({**given.inputs, "labels": labels}, given.modality)], 2)
    expected = batch.inputs["input_ids"].masked_fill(batch.inputs["attention_mask"] == 0, -100)
    assert torch.equal(batch.inputs["labels"], expected)


def test_models_that_cannot_continue_text_are_named():
    model = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    assert "encoder-decoder" in why_not_written(model)
    bare = LlamaModel(build_llama().config)
    assert "cannot generate" in why_not_written(bare)
    with pytest.raises(ValueError, match=r"written_samples=0"):
        write_samples(bare, [text_batch([9])], 1)
    with pytest.raises(ValueError, match="got none"):
        write_samples(build_llama(), [], 1)
