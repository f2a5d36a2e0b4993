"""Tiny random models of real classes, saved with a processor, and helpers that the tests share."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from loopback_hub import running_hub
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

import sab_hf
from sab_hf import SABLinear, SABQuantizationConfig

torch.set_num_threads(1)
os.environ["SAB_EXACT"] = "1"  # packed is compared with dense; what int8 kernels round has tests of its own

V5 = int(transformers.__version__.split(".")[0]) >= 5
NUM_BLOCKS = 2
IMAGE_SIZE, PATCH_SIZE = 16, 8  # pixels
PAD, END, IMAGE = 256, 257, 258  # ids 0 to 255 are the bytes
SPECIAL_TOKENS = ("<pad>", "<end>", "<image>")
VOCAB_SIZE = 264
BLOCKS = "model.language_model.layers"
PARTS = [f"model.{p}" for p in ("vision_tower", "multi_modal_projector", "language_model.embed_tokens")]
PARTS += ["model.language_model.norm", "model.language_model.rotary_emb", "lm_head"]
# device map of the tests' LLaVA
CPU = dict.fromkeys([*PARTS, BLOCKS], "cpu")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{{ '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: left out unless asked for with -m slow")


def pytest_collection_modifyitems(config, items):
    if "slow" not in (config.option.markexpr or ""):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    return torch.device(request.param)


# ---- models


def text_config(**changes) -> LlamaConfig:
    """Return a Llama of two blocks whose widths are no multiples of anything large; 40 columns do not fill a mask byte."""
    values = {
        "hidden_size": 40,
        "intermediate_size": 88,
        "num_hidden_layers": NUM_BLOCKS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": END,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }
    return LlamaConfig(**values | changes)


def build_llava(seed: int = 0, tied: bool = False, **text_changes) -> LlavaForConditionalGeneration:
    """Return a random LLaVA with a SigLIP tower, float32."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            vision_use_head=False,
        ),
        text_config=text_config(**text_changes),
        image_token_index=IMAGE,
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=tied,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)  # zero by default, which would hide a lost bias
    model.generation_config.eos_token_id = None  # so that generation has a known length
    return model


def build_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    """Return a random text-only Llama, float32."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(text_config(**changes)).eval()
    model.generation_config.eos_token_id = None
    return model


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token a byte."""
    letters = _byte_letters()
    tokenizer = Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_processor() -> LlavaProcessor:
    """Return the processor of `build_llava`."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=SiglipImageProcessor(size=side, do_convert_rgb=True),
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def _byte_letters() -> dict[int, str]:
    """Return GPT-2's printable letter for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


def build_samples(count: int = 6) -> list[list[dict]]:
    """Return chat messages about drawn images, of different lengths."""
    samples = []
    for i in range(count):
        image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (40 * i, 255 - 40 * i, 90))
        ImageDraw.Draw(image).rectangle((i, 2, i + 6, 9), fill=(255, 255 - 30 * i, 30 * i))
        question = [
            {"type": "image", "image": image},
            {"type": "text", "text": f"What is at {i}?" + " And why?" * (i % 3)},
        ]
        answer = [{"type": "text", "text": f"A box, number {i}."}]
        samples.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    return samples


# ---- fixtures


@pytest.fixture(scope="session")
def samples() -> list[list[dict]]:
    return build_samples()


@pytest.fixture(scope="session")
def processor() -> LlavaProcessor:
    return build_processor()


@pytest.fixture(scope="session")
def vlm_dir(tmp_path_factory) -> Path:
    """A saved dense LLaVA with its processor and with biases in the attention of its language blocks."""
    return save_dense(build_llava(attention_bias=True), tmp_path_factory.mktemp("vlm"))


@pytest.fixture
def model() -> LlavaForConditionalGeneration:
    """The model of `vlm_dir`, in memory."""
    return build_llava(attention_bias=True)


@pytest.fixture(scope="session")
def make_config(samples):
    """Return a config that is calibrated in a moment; keyword arguments change it."""

    def make(**changes) -> SABQuantizationConfig:
        values = {"calibration": samples, "num_samples": 4, "alternations": 2, "refine_steps": 0}
        values |= {"budget": "uniform"}  # so that every module has a residual plane
        return SABQuantizationConfig(**values | changes)

    return make


@pytest.fixture(scope="session")
def packed_dir(vlm_dir, make_config, tmp_path_factory) -> Path:
    """`vlm_dir`, binarized and saved. Read only: copy it before changing a file."""
    path = tmp_path_factory.mktemp("packed")
    load(vlm_dir, quantization_config=make_config()).save_pretrained(path)
    build_processor().save_pretrained(path)
    return path


@pytest.fixture
def damage(packed_dir, tmp_path):
    """Return a function that copies `packed_dir` with changed tensors and config: `damage(tensors=f, config=g)`.

    The copy has no checksums, so that the checks behind them are reached; `test_integrity.py` tests the checksums.
    """

    def copy(tensors=None, config=None) -> Path:
        path = tmp_path / "damaged"
        shutil.copytree(packed_dir, path)
        if tensors is not None:
            content = load_file(path / "model.safetensors")
            tensors(content)
            save_file(content, path / "model.safetensors", metadata={"format": "pt"})
        content = json.loads((path / "config.json").read_text())
        content["quantization_config"]["checksums"] = None
        if config is not None:
            config(content["quantization_config"])
        (path / "config.json").write_text(json.dumps(content))
        return path

    return copy


@pytest.fixture
def inputs(samples, processor) -> dict[str, Tensor]:
    """A processed prompt with an image."""
    prompt = processor.apply_chat_template(samples[5][:1], tokenize=False, add_generation_prompt=True)
    return dict(processor(text=[prompt], images=[samples[5][0]["content"][0]["image"]], return_tensors="pt"))


# ---- helpers


def save_dense(model: nn.Module, path: Path) -> Path:
    model.save_pretrained(path)
    build_processor().save_pretrained(path)
    return path


def load(path: Path, dtype: torch.dtype = torch.float32, **kwargs) -> nn.Module:
    return AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, **kwargs).eval()


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    cast = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    return model(**cast).logits.float()


def generate(model: nn.Module, inputs: dict[str, Tensor], count: int = 8) -> list[int]:
    cast = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    return model.generate(**cast, max_new_tokens=count, do_sample=False)[0].tolist()


def packed_linears(model: nn.Module) -> dict[str, SABLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SABLinear)}


def file_entries(path: Path) -> dict[str, dict]:
    """Read the headers of all safetensors files in a folder: name → dtype, shape, data_offsets."""
    entries = {}
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as f:
            header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        header.pop("__metadata__", None)
        assert not entries.keys() & header.keys()
        entries |= header
    return entries


def file_bytes(path: Path) -> int:
    """Return the tensor bytes of all safetensors files in a folder, read from their headers."""
    return sum(end - start for start, end in (entry["data_offsets"] for entry in file_entries(path).values()))


@pytest.fixture(scope="module")
def saved(packed_dir, tmp_path_factory) -> Path:
    """A packed checkpoint with processor, card and report."""
    path = tmp_path_factory.mktemp("saved") / "tiny-sab"
    sab_hf.save(load(packed_dir), build_processor(), path)
    return path


@pytest.fixture
def questions(tmp_path) -> str:
    """A file of questions with answers."""
    rows = [{"question": f"Say {i}.", "answer": f"It is {i}, as you wished."} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "data.jsonl")


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine, and the client of this process pointed at it."""
    with running_hub() as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_loopback")
        yield running
