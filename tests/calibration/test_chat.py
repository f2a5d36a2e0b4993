"""Chat templates and processors of every kind, padding, and a tokenizer left as it was."""

import filecmp

import pytest
import torch
from tiny_processor import (
    IMAGE_TOKENS,
    MIXED,
    PARTS,
    STRING,
    make_config,
    make_processor,
    make_tokenizer,
    picture,
    texts_of,
)
from tokenizers.processors import TemplateProcessing
from transformers import Blip2Config, Blip2Processor, BlipImageProcessor, LlavaProcessor

from sab_hf.calibration import IMAGE, PADDING, prepare_calibration

IMAGE_PART, QUESTION = {"type": "image", "image": picture()}, {"type": "text", "text": "What is it?"}
CONVERSATION = [{"role": "user", "content": [IMAGE_PART, QUESTION]}, {"role": "assistant", "content": "A sky."}]


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def config(processor):
    return make_config(processor)


@pytest.mark.parametrize("template", [PARTS, MIXED, STRING, None])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_prepare_calibration_works_with_any_kind_of_template(template, batch_size):
    processor = make_processor(template)
    rows = [{"image": picture(), "question": f"Number {'x' * i}?", "answer": "yes"} for i in range(4)]
    rows += [{"images": [picture(), picture(4)], "question": "Two?"}, {"text": "Only text", "answer": "fine"}]
    result = prepare_calibration(rows, processor, make_config(processor), num_samples=6, batch_size=batch_size)
    assert result.num_samples == 6
    assert result.tokens[IMAGE] == 6 * IMAGE_TOKENS
    joined = "".join(texts_of(result, processor))
    assert all(f"Number {'x' * i}?" in joined for i in range(4))
    assert ("assistant: " in joined) == (template is not None)


@pytest.mark.parametrize("template", [PARTS, MIXED, STRING, None])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_prepare_calibration_keeps_the_text_where_a_tokenizer_has_any_kind_of_template(template, batch_size):
    processor = make_processor()
    tokenizer = processor.tokenizer
    tokenizer.chat_template = template
    rows = ["Once upon a time", {"question": "What?", "answer": "Nothing."}]
    result = prepare_calibration(
        rows, tokenizer, make_config(processor), num_samples=2, batch_size=batch_size, allow_text_only=True
    )
    texts = texts_of(result, processor)
    assert any("Once upon a time" in text for text in texts)
    expected = "What?\nNothing." if template is None else "user: What?\nassistant: Nothing.\n"
    assert any(expected in text for text in texts)


def test_prepare_calibration_prefers_the_tokenizers_template_to_none():
    processor = make_processor(None)
    processor.tokenizer.chat_template = PARTS
    result = prepare_calibration([CONVERSATION], processor, make_config(processor), num_samples=1)
    assert "assistant: A sky." in texts_of(result, processor)[0]


@pytest.mark.parametrize("template", [PARTS, MIXED, STRING])
def test_prepare_calibration_begins_with_one_token_where_the_template_writes_it(template):
    processor = make_processor("{{ bos_token }}" + template)
    bos = processor.tokenizer.bos_token_id
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    result = prepare_calibration([CONVERSATION], processor, make_config(processor), num_samples=1)
    assert result.batches[0].inputs["input_ids"][0].tolist().count(bos) == 1


def test_prepare_calibration_skips_text_where_the_model_needs_an_image():
    processor = Blip2Processor(
        BlipImageProcessor(size={"height": 56, "width": 56}), make_tokenizer(pad_token="<pad>"), num_query_tokens=8
    )
    config = Blip2Config(image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"))
    rows = [{"image": picture(), "question": "What?", "answer": "Sky"}, {"text": "Only text"}]
    result = prepare_calibration(rows, processor, config, num_samples=2)
    assert result.num_samples == 1
    assert result.tokens[IMAGE] == 8  # the processor's own; none is written beside them
    with pytest.raises(ValueError, match="none of the 1 calibration samples has an image"):
        prepare_calibration(rows[1:], processor, config, num_samples=2)


def test_prepare_calibration_pads_on_the_right_and_counts_no_padding(processor, config):
    rows = [{"image": picture(), "question": "x" * n} for n in (1, 9, 30)]
    result = prepare_calibration(rows, processor, config, num_samples=3, batch_size=3)
    (batch,) = result.batches
    padding = batch.modality == PADDING
    assert torch.equal(padding, batch.inputs["attention_mask"] == 0)
    assert padding.sum(1).tolist() == [29, 21, 0]
    assert not padding[:, 0].any()
    assert sum(result.tokens.values()) == int((~padding).sum())
    assert PADDING not in result.tokens


def test_prepare_calibration_pads_on_the_right_where_the_processor_ignores_the_side(config):
    class Ignoring(LlavaProcessor):  # as MllamaProcessor of transformers 4.57
        def __call__(self, *args, padding_side=None, **kwargs):
            return super().__call__(*args, **kwargs)

    processor = make_processor()
    processor.__class__ = Ignoring
    processor.tokenizer.init_kwargs.pop("padding_side", None)
    rows = [{"image": picture(), "question": "x" * n} for n in (1, 9)]
    (batch,) = prepare_calibration(rows, processor, config, num_samples=2, batch_size=2).batches
    assert (batch.modality[:, 0] != PADDING).all()


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("state", ["fresh", "padding and truncation set"])
def test_prepare_calibration_leaves_the_saved_tokenizer_as_it_was(tmp_path, batch_size, state):
    processor = make_processor()
    backend = processor.tokenizer.backend_tokenizer
    if state != "fresh":
        backend.enable_truncation(max_length=7, strategy="only_first")
        backend.enable_padding(length=12, pad_id=3, pad_token="<pad>")
    before = (backend.truncation, backend.padding)
    processor.save_pretrained(tmp_path / "before")
    rows = [CONVERSATION, {"image": picture(), "question": "A longer question than seven tokens?"}]
    prepare_calibration(rows, processor, make_config(processor), num_samples=2, batch_size=batch_size)
    assert (backend.truncation, backend.padding) == before
    assert processor.tokenizer.padding_side == "left"
    processor.save_pretrained(tmp_path / "after")
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert "tokenizer.json" in names
    assert filecmp.cmpfiles(tmp_path / "before", tmp_path / "after", names, shallow=False) == (names, [], [])


def test_prepare_calibration_restores_the_tokenizer_after_an_error(processor, config):
    with pytest.raises(ValueError, match="cannot read the image"):
        prepare_calibration([{"image": "missing.png", "text": "?"}], processor, config, num_samples=1)
    assert processor.tokenizer.padding_side == "left"
    assert processor.tokenizer.backend_tokenizer.truncation is None


def test_prepare_calibration_without_pad_token_falls_back_to_single_samples(caplog):
    processor = make_processor(pad_token=None)
    rows = [CONVERSATION, {"image": picture(), "question": "Longer than the other?"}]
    result = prepare_calibration(rows, processor, make_config(processor), num_samples=2, batch_size=2)
    assert [len(batch.modality) for batch in result.batches] == [1, 1]
    assert "no pad token" in caplog.text


def test_prepare_calibration_shrinks_large_images(config):
    processor, seen = make_processor(), []
    original = processor.image_processor.__class__.__call__

    class Watching(processor.image_processor.__class__):
        def __call__(self, images, *args, **kwargs):
            seen.append(images[0][0].size)
            return original(self, images, *args, **kwargs)

    processor.image_processor.__class__ = Watching
    sample = {"image": picture(size=(400, 100)), "question": "?"}
    prepare_calibration([sample], processor, config, num_samples=1, max_image_pixels=10_000)
    prepare_calibration([sample], processor, config, num_samples=1, max_image_pixels=None)
    assert seen[-2:] == [(200, 50), (400, 100)]


def test_prepare_calibration_warns_when_the_processor_loses_the_images(config, caplog):
    class Losing(LlavaProcessor):
        def __call__(self, *args, **kwargs):
            inputs = super().__call__(*args, **kwargs)
            inputs.pop("pixel_values", None)
            return inputs

    processor = make_processor()
    processor.__class__ = Losing
    prepare_calibration([CONVERSATION], processor, config, num_samples=1)
    assert "Losing returned no pixel values for 1 of 1 samples" in caplog.text
