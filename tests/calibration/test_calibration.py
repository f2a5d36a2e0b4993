"""Calibration sets: forms of samples, modalities, lengths, numbers, processed batches."""

import logging
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_processor import IMAGE_TOKENS, STRING, make_config, make_processor, make_tokenizer, picture, texts_of
from transformers import LlamaConfig, LlavaForConditionalGeneration

from sab_hf.calibration import AUDIO, IMAGE, PADDING, TEXT, VIDEO, prepare_calibration, token_modality


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def config(processor):
    return make_config(processor)


IMAGE_PART = {"type": "image", "image": picture()}
QUESTION, ANSWER = {"type": "text", "text": "What is it?"}, {"role": "assistant", "content": "A sky."}
CONVERSATION = [{"role": "user", "content": [IMAGE_PART, QUESTION]}, ANSWER]
ONE_SAMPLE_FORMS = {
    "messages": CONVERSATION,
    "dict of messages": {"messages": CONVERSATION},
    "images fill empty parts": {
        "messages": [{"role": "user", "content": [{"type": "image"}, QUESTION]}, ANSWER],
        "images": [picture()],
    },
    "Arrow's filling of missing keys": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, QUESTION | {"image": None}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A sky.", "image": None}]},
        ],
        "images": [picture()],
        "image": None,
    },
    "markers in the text": {
        "messages": [{"role": "user", "content": "<image>\nWhat is it?"}, ANSWER],
        "images": [picture()],
    },
    "image beside plain messages": {
        "messages": [{"role": "user", "content": "What is it?"}, ANSWER],
        "image": picture(),
    },
    "question": {"image": picture(), "question": "What is it?", "answer": "A sky."},
    "prompt": {"image": picture(mode="RGBA"), "prompt": "What is it?", "answer": "A sky.", "label": 3},
    "text": {"images": [picture(mode="P")], "text": "What is it?", "answer": "A sky."},
}


@pytest.mark.parametrize("form", ONE_SAMPLE_FORMS)
def test_prepare_calibration_reads_every_form_of_a_sample_alike(form, processor, config):
    result = prepare_calibration([ONE_SAMPLE_FORMS[form]], processor, config, num_samples=1)
    expected = "user: " + "<image>" * IMAGE_TOKENS + "What is it?\nassistant: A sky.\n"
    assert texts_of(result, processor) == [expected]
    assert result.tokens == {TEXT: len(expected) - IMAGE_TOKENS * len("<image>"), IMAGE: IMAGE_TOKENS}
    assert result.batches[0].inputs["pixel_values"].shape == (1, 3, 56, 56)
    assert result.image_token_share() == pytest.approx(IMAGE_TOKENS / sum(result.tokens.values()))


def test_prepare_calibration_leaves_the_callers_samples_alone(processor, config):
    sample = {"messages": [{"role": "user", "content": [{"type": "image"}, QUESTION]}], "images": [picture()]}
    prepare_calibration([sample], processor, config, num_samples=1)
    assert sample["messages"] == [{"role": "user", "content": [{"type": "image"}, QUESTION]}]


def test_prepare_calibration_runs_through_the_model(processor, config):
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    rows = [CONVERSATION, {"text": "Only text"}, {"image": picture(3), "question": "A longer question, this one?"}]
    alone = prepare_calibration(rows, processor, config, num_samples=3)
    padded = prepare_calibration(rows, processor, config, num_samples=3, batch_size=3)
    assert alone.tokens == padded.tokens

    def row_logits(calibration_set):
        rows = {}
        for batch in calibration_set.batches:
            logits = model(**batch.inputs).logits
            for row, kinds, ids in zip(logits, batch.modality, batch.inputs["input_ids"], strict=True):
                rows[tuple(ids[kinds != PADDING].tolist())] = row[kinds != PADDING]
        return rows

    with torch.no_grad():
        single, together = row_logits(alone), row_logits(padded)
    assert single.keys() == together.keys()
    for key, logits in single.items():
        torch.testing.assert_close(together[key], logits, atol=1e-4, rtol=1e-4)


# Length, number and order of samples.


def test_first_batches_are_not_the_shortest_samples_with_images(processor, config):
    rows = [{"text": "word " * (1 + i)} for i in range(24)] + [
        {"image": picture(), "text": "w " * (1 + i)} for i in range(24)
    ]
    kinds, lengths = set(), []
    for batch in prepare_calibration(rows, processor, config, num_samples=48, batch_size=4).batches[:6]:
        kinds.add(bool((batch.modality == IMAGE).any()))
        lengths.append(int((batch.modality == TEXT).sum(1).float().mean()))
    assert kinds == {True, False}
    assert lengths != sorted(lengths)


def test_prepare_calibration_drops_long_samples_and_takes_others(processor, config, caplog):
    rows = [{"image": picture(), "question": "x" * (500 if i % 2 else 5)} for i in range(8)]
    result = prepare_calibration(rows, processor, config, num_samples=3, max_length=100)
    assert result.num_samples == 3
    assert all("x" * 6 not in text for text in texts_of(result, processor))
    result = prepare_calibration(rows, processor, config, num_samples=8, max_length=100)
    assert (result.num_samples, result.num_dropped) == (4, 4)
    assert "num_samples=8 was asked for, only 4" in caplog.text
    assert "4 over-long samples dropped" in result.summary()


def test_prepare_calibration_says_what_to_raise_when_all_are_too_long(processor, config):
    rows = [{"image": picture(), "question": "x" * n} for n in (30, 50)]
    shortest = len("user: \n") + IMAGE_TOKENS + 30
    with pytest.raises(ValueError, match=rf"all 2 .* max_length=40 .*raise `max_length` to at least {shortest}"):
        prepare_calibration(rows, processor, config, num_samples=2, max_length=40)
    with pytest.raises(ValueError, match="all 2 calibration samples with images"):
        prepare_calibration([*rows, {"text": "short"}], processor, config, num_samples=3, max_length=40)
    kept = prepare_calibration(
        [*rows, {"text": "short"}], processor, config, num_samples=3, max_length=40, allow_text_only=True
    )
    assert kept.tokens.keys() == {TEXT}


def test_prepare_calibration_depends_on_the_seed_alone(processor, config):
    rows = [{"image": picture(), "question": f"Question {i}"} for i in range(30)]

    def order(seed):
        result = prepare_calibration(rows, processor, config, num_samples=5, seed=seed)
        return [batch.inputs["input_ids"].tolist() for batch in result.batches]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_prepare_calibration_takes_a_generator(processor, config):
    rows = ({"image": picture(), "question": f"Question {i}"} for i in range(1000))
    assert prepare_calibration(rows, processor, config, num_samples=3).num_samples == 3
    assert next(rows)["question"] == "Question 12"  # four tries for each sample, no more


@pytest.mark.parametrize("name", ["num_samples", "max_length", "batch_size"])
def test_prepare_calibration_rejects_numbers_below_one(name, processor, config):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        prepare_calibration([CONVERSATION], processor, config, **{name: 0})


# Modalities.


@given(data=st.data(), shape=st.tuples(st.integers(1, 3), st.integers(1, 12)), given_ids=st.booleans())
@settings(max_examples=60, deadline=None)
def test_token_modality_matches_a_loop(data, shape, given_ids):
    class Config:
        image_token_id, video_token_index, audio_token_id = 7, 8, None

    count = shape[0] * shape[1]
    ids = data.draw(st.lists(st.integers(5, 9), min_size=count, max_size=count))
    mask = data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    kinds = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    inputs = {"input_ids": torch.tensor(ids).view(shape), "attention_mask": torch.tensor(mask).view(shape)}
    if given_ids:
        inputs["mm_token_type_ids"] = torch.tensor(kinds).view(shape)
    expected = []
    for token, seen, kind in zip(ids, mask, kinds, strict=True):
        by_token = {7: IMAGE, 8: VIDEO}.get(token, TEXT)
        expected.append(PADDING if not seen else kind if given_ids and kind else by_token)
    result = token_modality(inputs, Config())
    assert result.dtype == torch.int8
    assert result.flatten().tolist() == expected


def test_token_modality_looks_into_parts_of_the_config():
    class Thinker:
        image_token_index, audio_token_index = 4, 5

    class Omni:
        sub_configs = {"talker_config": object, "thinker_config": object}  # noqa: RUF012
        talker_config, thinker_config = None, Thinker()

    assert token_modality({"input_ids": torch.tensor([[3, 4, 5]])}, Omni()).tolist() == [[TEXT, IMAGE, AUDIO]]


def test_token_modality_rejects_a_mask_of_another_shape():
    inputs = {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 1, 3, 3)}
    with pytest.raises(ValueError, match=r"shape of 'input_ids', \(1, 3\), got \(1, 1, 3, 3\)"):
        token_modality(inputs, object())


def test_prepare_calibration_refuses_text_alone_for_a_vision_model(processor, config, caplog):
    with pytest.raises(ValueError, match=r"must have image tokens, got 0.*allow_text_only=True"):
        prepare_calibration(["Just text."], processor, config, num_samples=1)
    result = prepare_calibration(["Just text."], processor, config, num_samples=1, allow_text_only=True)
    assert result.image_token_share() == 0
    assert "visual side of the model is calibrated on nothing" in caplog.text


def test_prepare_calibration_takes_text_for_a_text_model(processor, caplog):
    tokenizer = make_tokenizer(pad_token="<pad>", chat_template=STRING)
    result = prepare_calibration([CONVERSATION, "Hello."], tokenizer, LlamaConfig(), num_samples=2)
    texts = [tokenizer.decode(batch.inputs["input_ids"][0]) for batch in result.batches]
    assert sorted(texts) == ["user: Hello.\n", "user: What is it?\nassistant: A sky.\n"]
    assert result.tokens.keys() == {TEXT}
    assert "of 1 samples with images, video or audio only the text is used" in caplog.text
    bare = prepare_calibration([CONVERSATION], make_tokenizer(), LlamaConfig(), num_samples=1)
    assert tokenizer.decode(bare.batches[0].inputs["input_ids"][0]) == "What is it?\nA sky."


def test_prepare_calibration_names_a_tokenizer_given_for_a_vision_model(processor, config):
    with pytest.raises(ValueError, match=f"{type(processor.tokenizer).__name__} is not the model's full processor"):
        prepare_calibration([CONVERSATION], processor.tokenizer, config, num_samples=1)


# Processed batches.


def test_prepare_calibration_passes_processed_batches_unchanged(processor, config):
    inputs = processor(text=["<image>?"], images=[picture()], return_tensors="pt")
    inputs["anything_else"] = marker = object()
    result = prepare_calibration([inputs], None, config, num_samples=1)
    assert result.batches[0].inputs.keys() == inputs.keys()
    assert all(result.batches[0].inputs[key] is inputs[key] for key in inputs)
    assert result.batches[0].inputs["anything_else"] is marker
    assert result.tokens == {IMAGE: IMAGE_TOKENS, TEXT: 1}


def test_prepare_calibration_counts_rows_of_processed_batches(config, caplog):
    def batch(rows, length):
        ids = torch.full((rows, length), config.image_token_index)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids).index_fill_(1, torch.tensor([0]), 0)}

    batches = [batch(2, 4), batch(2, 5), batch(2, 90), batch(2, 6)]
    result = prepare_calibration(batches, None, config, num_samples=8, max_length=50)
    assert (result.num_samples, result.num_dropped) == (6, 2)
    assert result.tokens == {IMAGE: 2 * (3 + 4 + 5)}
    assert "no pixel values: the images are lost" in caplog.text
    assert prepare_calibration(batches, None, config, num_samples=3, max_length=50).num_samples == 4
    with pytest.raises(ValueError, match=r"all 1 .* \(the shortest has 90\)"):
        prepare_calibration(batches[2:3], None, config, num_samples=3, max_length=50)


@pytest.mark.parametrize(
    ("ids", "shown"),
    [
        ([[1, 2]], "list"),
        (torch.ones(3).long(), r"torch\.int64 \(3,\)"),
        (torch.ones(1, 3), r"torch\.float32 \(1, 3\)"),
    ],
)
def test_prepare_calibration_names_a_bad_processed_batch(ids, shown, config):
    with pytest.raises(
        ValueError, match=rf"batch 0: key 'input_ids' must be a tensor of integers \[batch, length\], got {shown}"
    ):
        prepare_calibration([{"input_ids": ids}], None, config)


def test_prepare_calibration_logs_the_shares_before_it_starts(processor, config, caplog):
    with caplog.at_level(logging.INFO, logger="sab_hf"):
        result = prepare_calibration([CONVERSATION], processor, config, num_samples=1)
    assert result.summary() in caplog.text
    share = f"image {100 * IMAGE_TOKENS / sum(result.tokens.values()):.1f} %"
    assert result.summary().startswith("calibration set: 1 samples in 1 batches")
    assert share in result.summary()


def test_prepare_calibration_uses_the_builtin_set_without_any_dataset_library(processor, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it now fails
    result = prepare_calibration("builtin", processor, config, num_samples=8)
    assert result.num_samples == 8
    assert result.tokens[IMAGE] == 6 * IMAGE_TOKENS
    text_model = prepare_calibration("builtin", make_tokenizer(), LlamaConfig(), num_samples=8)
    assert text_model.tokens.keys() == {TEXT}


# What would be lost in silence, and what no model takes.


@pytest.mark.parametrize(("kind", "name"), [("video", "clip.mp4"), ("audio", "speech.wav")])
def test_prepare_calibration_refuses_media_that_the_processor_ignores(kind, name, processor, config, tmp_path):
    (tmp_path / name).write_bytes(b"content")
    content = [IMAGE_PART, {"type": kind, kind: str(tmp_path / name)}, QUESTION]
    with pytest.raises(ValueError, match=rf"^sample 0: it holds {kind}, which LlavaProcessor does not read"):
        prepare_calibration([[{"role": "user", "content": content}, ANSWER]], processor, config, num_samples=1)


def test_prepare_calibration_refuses_rows_whose_pictures_it_does_not_read(processor, config, caplog):
    rows = [{"image": picture(), "question": "What?"}, {"img": picture(), "question": "What?"}]
    with pytest.raises(ValueError, match=r"^sample 1: key 'img' holds media, .* name a picture 'image'"):
        prepare_calibration(rows, processor, config, num_samples=2)
    prepare_calibration([rows[0] | {"mask": picture()}], processor, config, num_samples=1)
    assert "further media under the keys ['mask'], which are not read" in caplog.text


def test_prepare_calibration_names_the_batch_with_a_token_of_another_vocabulary(processor, config):
    def batches(token):
        return [
            {"input_ids": torch.tensor([[5, 6, config.image_token_index]])},
            {"input_ids": torch.tensor([[5, token, 7]])},
        ]

    for token in (-1, 300, 2**40):
        with pytest.raises(
            ValueError, match=rf"^batch 1: 'input_ids' must be from 0 to 299.* got {token} at row 0, position 1"
        ):
            prepare_calibration(batches(token), None, config, num_samples=2, vocabulary=300)
    prepare_calibration(batches(299), None, config, num_samples=2, vocabulary=300)
    known = prepare_calibration(batches(4), None, config, num_samples=2, vocabulary=config.image_token_index)
    assert known.tokens[IMAGE] == 1  # a placeholder needs no embedding
    with pytest.raises(ValueError, match=r"^sample 0: 'input_ids' must be from 0 to 9"):
        prepare_calibration([CONVERSATION], processor, config, num_samples=1, vocabulary=10)


def test_prepare_calibration_names_the_sample_that_a_processor_fails_on(processor, config):
    lone = "half of a pair: \ud800"
    with pytest.raises(ValueError, match=r"^sample 0: LlavaProcessor cannot process the sample \(\w+: "):
        prepare_calibration([{"image": picture(), "text": lone}], processor, config, num_samples=1)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**70, 1.5])
def test_seeds_that_no_generator_takes_are_refused_with_the_range(processor, seed):
    with pytest.raises(
        ValueError, match=rf"`seed` must be an integer of at least 0 and at most {2**63 - 1}, got {seed}"
    ):
        prepare_calibration("builtin", processor, None, seed=seed)
