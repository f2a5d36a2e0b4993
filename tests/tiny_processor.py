"""A LLaVA processor over bytes and the config of a model for it, for the tests of calibration; nothing is downloaded."""

from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

PARTS = (
    "{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
)
STRING = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
MIXED = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'user' %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% else %}{{ '' + m['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
)
IMAGE_TOKENS = 16  # a 56-pixel image in patches of 14


def make_tokenizer(**special) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )


def make_processor(template: str | None = PARTS, **special) -> LlavaProcessor:
    special = {"pad_token": "<pad>"} | special
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        make_tokenizer(extra_special_tokens={"image_token": "<image>"}, **special),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def make_config(processor: LlavaProcessor) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=processor.image_token_id)


def picture(tone: int = 90, size: tuple[int, int] = (60, 40), mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", size, (tone, 120, 200)).convert(mode)


def texts_of(calibration_set, processor) -> list[str]:
    rows = [ids for batch in calibration_set.batches for ids in batch.inputs["input_ids"]]
    return sorted(processor.tokenizer.decode(row).replace("<pad>", "") for row in rows)
