"""Tiny random models of real classes, their processors and samples, and what tests of several rooms compare with."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import struct
from pathlib import Path

import torch
import transformers
from hypothesis import strategies as st
from PIL import Image, ImageDraw
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

from sab_hf import SABLinear
from sab_hf.method.levels import Scales
from sab_hf.packing import to_tensors
from sab_hf.planes import SignPlanes

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


def png_base64(colour: tuple[int, int, int], size: tuple[int, int] = (24, 16)) -> str:
    """Return a picture of one colour as evaluations hold it."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


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


QUICK_OPTIONS = (
    "--set",
    "alternations=1",
    "--set",
    "refine_steps=0",
    "--set",
    "distil_steps=0",
    "--set",
    "allow_text_only=true",
)
"""Options of `sab-hf quantize` for a run that takes a second."""


def write_texts(folder: Path, words: int) -> None:
    """Write the texts that benchmarks of language models read, of random words."""
    draw = random.Random(0)
    for split in ("valid", "test"):
        text = (draw.choice(["sea", "lake", "fox", "crow", "sky", "blue"]) for _ in range(words))
        (folder / f"wikitext2_{split}.txt").write_text(" ".join(text))


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


# ---- planes and products


def random_planes(
    out_features: int,
    in_features: int,
    num_planes: int = 1,
    num_significant: int = 0,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
) -> SignPlanes:
    """Planes with random signs, scales of both signs and randomly placed significant columns."""
    generator = torch.Generator().manual_seed(seed)

    def signs(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) < 0.5

    def scales(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    residual = {}
    if num_significant:
        mask = torch.zeros(in_features, dtype=torch.bool)
        mask[torch.randperm(in_features, generator=generator)[:num_significant]] = True
        residual = {
            "significant_columns": mask,
            "residual_signs": signs(out_features, num_significant),
            "residual_row_scale": scales(out_features),
            "residual_col_scale": scales(num_significant),
        }
    return SignPlanes(
        signs(num_planes, out_features, in_features),
        scales(num_planes, out_features),
        scales(num_planes, in_features),
        **residual,
    )


@st.composite
def sizes(draw, largest: int = 40) -> tuple[int, int, int, int]:
    """out_features, in_features, num_planes 1 to 4 and num_significant 0 to in_features."""
    in_features = draw(st.integers(1, largest))
    return (
        draw(st.integers(1, largest)),
        in_features,
        draw(st.integers(1, 4)),
        draw(st.integers(0, in_features)),
    )


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def operands(planes: SignPlanes, device: torch.device | str = "cpu") -> tuple[torch.Tensor | None, ...]:
    """The packed tensors in the order of the op's arguments, scales as float16."""
    tensors = {
        name: tensor.view(torch.float16) if tensor.dtype == torch.int16 else tensor
        for name, tensor in to_tensors(planes).items()
    }
    return tuple(tensors[name].to(device) if name in tensors else None for name in SignPlanes.__dataclass_fields__)


def several(*matrices: SignPlanes, device: torch.device | str = "cpu") -> tuple[list[torch.Tensor | None], ...]:
    """The operands of several matrices in the order of the arguments of `sab::linears`."""
    return tuple(list(same) for same in zip(*[operands(planes, device) for planes in matrices], strict=True))


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_is_matmul(y: torch.Tensor, x: torch.Tensor, planes: SignPlanes) -> None:
    """Hold `y` against x Wᵀ in float64: float32 sums, and one rounding to the dtype of x."""
    W, x64 = planes.dense().double(), x.cpu().double()
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], W.shape[0])
    exact = x64 @ W.T
    bound = torch.finfo(x.dtype).eps * exact.abs() + 2e-6 * (x64.abs() @ W.abs().T) + 1e-6
    if x.dtype == torch.float16:
        bound = bound.where(exact.abs() < 65000, torch.inf)
    assert ((y.cpu().double() - exact).abs() <= bound).all()


def level_problem(rows, columns, planes, seed=0):
    """Return latents [rows, columns], and scales that have moved a little from where they started."""
    generator = torch.Generator().manual_seed(seed)
    latent = 1.5 * torch.randn(rows, columns, generator=generator)
    r = torch.rand(planes, rows, generator=generator) + 0.2
    c = torch.randn(planes, columns, generator=generator)
    c[-1, ::3] = 0  # a residual plane covers some columns only
    moved = (1 + 0.2 * torch.randn(part.shape, generator=generator) for part in (r, c))
    return latent, Scales(r, c, *(part * by for part, by in zip((r, c), moved, strict=True)))
