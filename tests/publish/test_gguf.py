"""GGUF files of portable checkpoints: their bytes against ggml's quantizer, what llama.cpp computes from them, and bad input."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import as_converted, read, write
from helpers import V5
from llama_cpp import serving
from PIL import Image
from portable_models import (
    FAMILIES,
    IMAGE,
    OTHER_FAMILIES,
    SPLITS,
    TEXTS,
    VOCAB_SIZE,
    build_portable,
    build_tokenizer,
    build_vlm,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import sab_hf
from sab_hf import SABQuantizationConfig, cli
from sab_hf.publish.gguf import export_gguf, q1_0
from sab_hf.publish.gguf_mmproj import add_tower_header

gguf = pytest.importorskip("gguf", reason="needs the package gguf")
Q1_0 = gguf.GGMLQuantizationType.Q1_0
IDS = torch.randint(0, 400, (12,), generator=torch.Generator().manual_seed(2)).tolist()


def quantize(model, **changes):
    ids = torch.randint(0, 400, (4, 16), generator=torch.Generator().manual_seed(3))
    values = {"fit": "elementwise", "significance": "none", "budget": "uniform", "alternations": 2, "num_samples": 4}
    config = SABQuantizationConfig(**{"portable": "gguf", "refine_steps": 0, "distil_steps": 0} | values | changes)
    sab_hf.quantize(model, None, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], config)
    return model


def save(model, folder: Path, kind: str = "gpt-2") -> Path:
    model.save_pretrained(folder)
    build_tokenizer(kind).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a function that gives the packed checkpoint of a family and its file with an embedding in float16."""
    known = {}

    def of(family: str) -> tuple[Path, Path]:
        if family not in known:
            folder = tmp_path_factory.mktemp(family)
            save(quantize(build_portable(family)), folder / "packed")
            export_gguf(folder / "packed", folder / "model.gguf", embedding="f16")
            known[family] = folder / "packed", folder / "model.gguf"
        return known[family]

    return of


@torch.no_grad()
def log_probabilities(folder: Path, ids: list[int]) -> torch.Tensor:
    model, _ = sab_hf.load(folder, dtype=torch.float32)
    return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def divergence(llama, wanted: torch.Tensor, ids: list[int]) -> float:
    """Return the largest divergence of llama.cpp's distributions after some of the tokens from the wanted ones, in nats."""
    places = (0, len(ids) // 2, len(ids) - 1)
    found = torch.stack([llama.log_probabilities(ids[: i + 1], wanted.shape[1]) for i in places])
    wanted = wanted[list(places)]
    return float((wanted.exp() * (wanted - found)).sum(-1).max())


# ---- bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_every_plane_has_the_bytes_that_ggml_makes_of_the_dense_weight(exported, family):
    libgguf = pytest.importorskip("libgguf", reason="needs the package libgguf")
    packed, path = exported(family)
    model, _ = sab_hf.load(packed, dtype=torch.float32)
    dense = as_converted(model.dequantize())
    compared = 0
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.tensor_type == Q1_0:
            W = dense[tensor.name].astype(np.float32)
            assert np.asarray(tensor.data).tobytes() == libgguf.quantize_rows_raw(Q1_0, W, *W.shape)
            compared += 1
    assert compared == (8 if family == "phi3" else 14)


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_planes_that_are_not_exported_have_the_bytes_that_ggml_makes_of_them_too(family):
    libgguf = pytest.importorskip("libgguf", reason="needs the package libgguf")
    packed = [m for m in quantize(build_portable(family)).modules() if isinstance(m, sab_hf.SABLinear)]
    assert packed
    for module in packed:
        W = module.planes().dense().numpy()
        found = q1_0(module.signs.detach()[0], module.row_scale.detach()[0].view(torch.float16))
        assert found.tobytes() == libgguf.quantize_rows_raw(Q1_0, W, *W.shape)


def test_negative_and_zero_scales_keep_the_weight():
    libgguf = pytest.importorskip("libgguf", reason="needs the package libgguf")
    signs = torch.randint(0, 256, (3, 32), dtype=torch.uint8)
    scale = torch.tensor([0.5, -0.25, 0.0], dtype=torch.float16)
    bits = np.unpackbits(signs.numpy(), axis=1, bitorder="little").astype(np.float32)
    W = (2 * bits - 1) * scale.float().numpy()[:, None]
    assert q1_0(signs, scale).tobytes() == libgguf.quantize_rows_raw(Q1_0, W, *W.shape)


# ---- what llama.cpp computes


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_transformers_does(exported, family, tmp_path):
    """With weights in float32 to rounding; with packed ones as near as activations of 8 bits come."""
    packed, path = exported(family)
    wanted = log_probabilities(packed, IDS)
    with serving(write(tmp_path / "float.gguf", read(path), like=path)) as llama:
        assert divergence(llama, wanted, IDS) < 1e-5
        model, _ = sab_hf.load(packed, dtype=torch.float32)
        answer = model.generate(torch.tensor([IDS]), max_new_tokens=12, do_sample=False, use_cache=True)
        assert llama.greedy(IDS, 12) == answer[0, len(IDS) :].tolist()
    with serving(path) as llama:
        assert divergence(llama, wanted, IDS) < 5e-3


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=["linear", "llama3"],
)  # fmt: skip
def test_scaled_rotary_positions(scaling, tmp_path):
    changes = (
        {"rope_parameters": scaling | {"rope_theta": 5000.0}} if V5 else {"rope_scaling": scaling, "rope_theta": 5000.0}
    )
    packed = save(quantize(build_portable("llama", **changes)), tmp_path / "packed")
    export_gguf(packed, tmp_path / "a.gguf", embedding="f16")
    ids = IDS * 4
    with serving(write(tmp_path / "b.gguf", read(tmp_path / "a.gguf"), like=tmp_path / "a.gguf")) as llama:
        assert divergence(llama, log_probabilities(packed, ids), ids) < 1e-5


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", *SPLITS, "pieces"])
def test_llama_cpp_reads_text_as_the_tokenizer_does(exported, kind, tmp_path):
    packed, _ = exported("qwen3")
    shutil.copytree(packed, tmp_path / "packed")
    tokenizer = build_tokenizer(kind)
    tokenizer.save_pretrained(tmp_path / "packed")
    export_gguf(tmp_path / "packed", tmp_path / "a.gguf")
    with serving(tmp_path / "a.gguf") as llama:
        for text in TEXTS:
            assert llama.tokens(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text
        assert llama.tokens(tokenizer.eos_token) == [tokenizer.eos_token_id]
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": "Hi!"}]
            shown = llama.ask("apply-template", messages=messages)["prompt"]
            assert shown == tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(("embedding", "most"), [("q8_0", 1e-2), ("q4_0", 1.0)])
def test_embedding_and_head_are_stored_smaller(exported, embedding, most, tmp_path):
    packed, path = exported("qwen2")
    result = export_gguf(packed, tmp_path / "a.gguf", embedding=embedding)
    assert result.num_bytes == (tmp_path / "a.gguf").stat().st_size < path.stat().st_size
    assert result.bytes_by_type["Q1_0"] == sum(
        t.n_bytes for t in gguf.GGUFReader(path).tensors if t.tensor_type == Q1_0
    )
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == embedding.upper()
    with serving(tmp_path / "a.gguf") as llama:
        assert divergence(llama, log_probabilities(packed, IDS), IDS) < most


def test_the_file_says_what_made_it(exported):
    fields = gguf.GGUFReader(exported("qwen3")[1]).fields
    said = {name: field.contents() for name, field in fields.items() if not name.startswith("tokenizer.")}
    assert said["general.quantized_by"] == "sab_hf"
    assert said["sab_hf.version"] == sab_hf.__version__
    assert said["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q1_0
    assert said["general.architecture"] == "qwen3"


# ---- vision-language models


MEAN, STD = [0.5, 0.4, 0.3], [0.3, 0.25, 0.2]
PICTURES = {"gemma3": (64, 64), "qwen2_5_vl": (168, 196)}  # height and width; llama.cpp need not resize them
TOKENS = {"gemma3": 4, "qwen2_5_vl": 6 * 7}
AROUND = {"gemma3": ("<start_of_image>", "<end_of_image>"), "qwen2_5_vl": ("<|vision_start|>", "<|vision_end|>")}


def save_vlm(model, folder: Path) -> Path:
    """Save a portable model with tokenizer and image processor."""
    save(model, folder)
    content = {"image_processor_type": "SiglipImageProcessor", "image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return folder


def load_vlm(folder: Path):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    """Return a function that gives the packed checkpoint of a vision-language model, its language file and its `mmproj`."""
    known = {}

    def of(family: str) -> tuple[Path, Path, Path]:
        if family not in known:
            folder = tmp_path_factory.mktemp(family)
            packed = save_vlm(quantize(build_vlm(family), allow_text_only=True), folder / "packed")
            result = export_gguf(packed, folder / "a.gguf", embedding="f16", mmproj=folder / "mmproj.gguf")
            assert result.mmproj == str(folder / "mmproj.gguf")
            known[family] = packed, folder / "a.gguf", folder / "mmproj.gguf"
        return known[family]

    return of


def picture_inputs(family: str, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what a model takes for one picture [height, width, 3] in 0…255."""
    seen = ((pixels / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)
    if family == "gemma3":
        return {"pixel_values": seen[None]}
    rows, columns = (side // 14 for side in seen.shape[1:])
    patches = seen.view(3, rows // 2, 2, 14, columns // 2, 2, 14).permute(1, 4, 2, 5, 0, 3, 6)
    both = patches.reshape(rows * columns, 3, 1, 14, 14).expand(-1, -1, 2, -1, -1).flatten(1)  # a picture is two frames
    return {"pixel_values": both, "image_grid_thw": torch.tensor([[1, rows, columns]])}


@torch.no_grad()
@pytest.mark.parametrize("family", PICTURES)
def test_llama_cpp_sees_a_picture_as_transformers_does(pictured, family, tmp_path):
    """With both files of an export; weights of the language model in float32, so that the rest is compared to float16."""
    packed, path, mmproj = pictured(family)
    text = write(tmp_path / "b.gguf", read(path), like=path)
    pixels = torch.randint(
        0, 256, (*PICTURES[family], 3), generator=torch.Generator().manual_seed(4), dtype=torch.uint8
    )
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    before, after = AROUND[family]
    with serving(text, mmproj) as llama:
        first = llama.tokens(f"Look: {before}")
        ids = torch.tensor([first + [IMAGE] * TOKENS[family] + llama.tokens(f"{after} What?")])
        prompt = llama.prompt_with((tmp_path / "a.png").read_bytes(), "Look: ", " What?")
        found = llama.log_probabilities(prompt, VOCAB_SIZE)
    loaded = load_vlm(packed)
    loaded.config.vision_start_token_id = first[-1]  # by which transformers 4 finds pictures
    inputs = {"input_ids": ids}
    if family == "gemma3" or V5:
        inputs["token_type_ids" if family == "gemma3" else "mm_token_type_ids"] = (ids == IMAGE).long()
    wanted, other = (
        loaded(**inputs, **picture_inputs(family, shown)).logits[0, -1].log_softmax(-1)
        for shown in (pixels, 255 - pixels)
    )
    assert (wanted.exp() * (wanted - found)).sum() < 1e-5
    assert (wanted.exp() * (wanted - other)).sum() > 1e-3


@torch.no_grad()
def test_the_language_part_of_a_qwen_vl_reads_text_alone(pictured, tmp_path):
    packed, path, _ = pictured("qwen2_5_vl")
    loaded = load_vlm(packed)
    wanted = loaded(torch.tensor([IDS])).logits[0].log_softmax(-1)
    with serving(write(tmp_path / "b.gguf", read(path), like=path)) as llama:
        assert divergence(llama, wanted, IDS) < 1e-5


def test_a_tower_is_written_in_float16_and_says_so(pictured):
    for family in PICTURES:
        packed, _, mmproj = pictured(family)
        fields = gguf.GGUFReader(mmproj).fields
        assert fields["general.architecture"].contents() == "clip"
        assert fields["sab_hf.version"].contents() == sab_hf.__version__
        kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(mmproj).tensors}
        vision = json.loads((packed / "config.json").read_text())["vision_config"]
        assert fields["clip.vision.embedding_length"].contents() == vision["hidden_size"]
        assert kinds["v.blk.1.attn_v.weight"] == kinds["v.blk.0.ffn_down.weight"] == "F16"
        assert kinds["v.blk.1.attn_v.bias"] == kinds["v.patch_embd.weight"] == "F32"


def test_an_export_without_its_tower_says_what_is_missing(pictured, exported, capsys, tmp_path):
    packed, path, mmproj = pictured("gemma3")
    assert cli.main(["export", "gguf", str(packed), str(tmp_path / "a.gguf"), "--embedding", "f16"]) == 0
    assert "it reads text alone: pictures need an `mmproj` file" in capsys.readouterr().out
    both = [str(tmp_path / name) for name in ("b.gguf", "mmproj.gguf")]
    assert cli.main(["export", "gguf", str(packed), both[0], "--embedding", "f16", "--mmproj", both[1]]) == 0
    assert f"saved: {both[1]}, vision tower and projector" in capsys.readouterr().out
    assert Path(both[0]).read_bytes() == path.read_bytes()
    assert Path(both[1]).read_bytes() == mmproj.read_bytes()
    assert cli.main(["export", "gguf", str(exported("qwen2")[0]), str(tmp_path / "c.gguf")]) == 0
    assert "pictures" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma3", {"hidden_act": "gelu"}, r"has the activation 'gelu', which llama.cpp has no key for"),
        ("gemma3", {"image_size": 72}, r"has 4 tokens for 9×9 patches"),
        ("qwen2_5_vl", {"hidden_act": "gelu"}, r"has the activation 'gelu'"),
        ("qwen2_5_vl", {"window_size": 56}, r"has windows of 56 pixels"),
        ("qwen2_5_vl", {"fullatt_block_indexes": [0]}, r"has attention to the whole picture in the blocks \[0\] of 2"),
        ("qwen2_5_vl", {"fullatt_block_indexes": []}, r"in the blocks \[\] of 2"),
        ("qwen2_5_vl", {"spatial_merge_size": 3}, r"has 3×3 patches in a token"),
        ("qwen2_5_vl", {"temporal_patch_size": 1}, r"has patches of 1 frames"),
    ],
)
def test_towers_that_llama_cpp_computes_otherwise_are_refused(family, changes, message, tmp_path):
    config = build_vlm(family).config
    for name, value in changes.items():
        setattr(config.vision_config, name, value)
    writer = gguf.GGUFWriter(tmp_path / "mmproj.gguf", "clip")
    with pytest.raises(ValueError, match=message):
        add_tower_header(writer, config, {"image_mean": MEAN, "image_std": STD})


def test_a_tower_that_cannot_be_written_leaves_nothing_behind(pictured, exported, monkeypatch, tmp_path):
    packed, *_ = pictured("qwen2_5_vl")
    output, mmproj = tmp_path / "a.gguf", tmp_path / "mmproj.gguf"
    text = exported("qwen2")[0]
    bare = tmp_path / "bare"
    shutil.copytree(packed, bare, ignore=shutil.ignore_patterns("preprocessor_config.json"))
    mute = shutil.copytree(packed, tmp_path / "mute")
    (mute / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessor"}')
    cases = [
        (
            text,
            mmproj,
            ValueError,
            r"an `mmproj` file holds a vision tower, and 'qwen2' has none; leave `mmproj` out",
        ),
        (bare, mmproj, OSError, r"bare` has no image processor beside its weights"),
        (mute, mmproj, OSError, r"mute` has no image processor .* how pictures are normalized \('image_mean'\)"),
        (packed, output, ValueError, r"are two files, and both shall be `.*a.gguf`"),
        (packed, tmp_path / "none" / "mmproj.gguf", OSError, "is no folder that can be written"),
        (packed, bare, ValueError, r"bare` exists, and an export replaces nothing"),
    ]
    for checkpoint, beside, kind, message in cases:
        with pytest.raises(kind, match=message):
            export_gguf(checkpoint, output, mmproj=beside)
        assert not list(tmp_path.glob("*.gguf*")), message

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(sab_hf.publish.gguf, "tower_tensors", full)
    with pytest.raises(OSError, match="no space left"):
        export_gguf(packed, output, mmproj=mmproj)
    assert not list(tmp_path.glob("*.gguf*"))


# ---- into a copy of an existing file


@pytest.fixture(scope="module")
def original(exported, tmp_path_factory):
    """The dense model of a family as an F16 file, with a remark in its metadata."""

    def of(family: str) -> Path:
        path = tmp_path_factory.mktemp("original") / "f16.gguf"
        return write(path, as_converted(build_portable(family)), like=exported(family)[1], remark="kept")

    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_put_into_a_copy_of_an_existing_file(exported, original, family, tmp_path):
    packed, path = exported(family)
    source = original(family)
    before = source.read_bytes()
    export_gguf(packed, tmp_path / "a.gguf", like=source, embedding="f16")
    assert source.read_bytes() == before
    new, anew = read(tmp_path / "a.gguf"), read(path)
    assert list(new) == [tensor.name for tensor in gguf.GGUFReader(source).tensors]
    assert new.keys() == anew.keys()
    assert all(np.array_equal(new[name], anew[name]) for name in new)
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert fields["remark"].contents() == "kept"
    assert (
        fields["tokenizer.chat_template"].contents()
        == gguf.GGUFReader(source).fields["tokenizer.chat_template"].contents()
    )
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q1_0
    with serving(tmp_path / "a.gguf") as llama:
        assert divergence(llama, log_probabilities(packed, IDS), IDS) < 5e-3


def test_files_of_other_models_are_refused(exported, original, tmp_path):
    packed, path = exported("llama")
    dense, source = as_converted(build_portable("llama")), original("llama")

    def changed(name: str, **changes) -> Path:
        tensors = {key: value for key, value in (dense | changes).items() if value is not None}
        return write(tmp_path / f"{name}.gguf", tensors, like=source)

    q, embedding = "blk.0.attn_q.weight", "token_embd.weight"
    turned = dense[q].reshape(4, -1, 2, 128).swapaxes(1, 2).reshape(128, 128)
    cases = [
        (original("qwen2"), r"its architecture is 'qwen2', 'llama' is required"),
        (
            changed("other", **as_converted(build_portable("llama", seed=1))),
            r"the values of `token_embd.weight` differ",
        ),
        (
            changed("weights", **{q: dense[q][::-1].copy()}),
            r"5\d % of the signs of `blk.0.attn_q.weight` are the same|4\d %",
        ),
        (
            changed("turned", **{q: np.ascontiguousarray(turned)}),
            r"% of the signs of `blk.0.attn_q.weight` are the same",
        ),
        (changed("shape", **{q: dense[q][:64]}), r"its `blk.0.attn_q.weight` is \[64, 128\], \[128, 128\] is required"),
        (changed("less", **{q: None}), r"it lacks the tensor `blk.0.attn_q.weight`"),
        (
            changed("more", **{"blk.0.attn_q_norm.weight": dense["output_norm.weight"]}),
            r"it has the tensor `blk.0.attn_q_norm",
        ),
        (
            changed("blocks", **{k.replace("blk.1", "blk.2"): v for k, v in dense.items()}),
            r"it has 3 blocks, 2 are required",
        ),
        (path, r"must be an F16, BF16 or F32 file, and its `blk.\d.\w+.weight` is Q1_0: it is quantized already"),
        (packed / "config.json", r"config.json` is no complete GGUF file"),
        (tmp_path / "none.gguf", r"there is no file `.*none.gguf`"),
    ]
    (tmp_path / "cut.gguf").write_bytes(source.read_bytes()[:-5000])
    cases.append((tmp_path / "cut.gguf", r"cut.gguf` is no complete GGUF file"))
    assert embedding in dense
    for like, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            export_gguf(packed, tmp_path / "out.gguf", like=like)
        assert "not of the model" not in str(error.value) or "pass an F16 file of the model" in str(error.value), like
        assert not list(tmp_path.glob("*out.gguf*")), like


# ---- bad input


def test_checkpoints_that_are_not_portable_are_refused(exported, tmp_path):
    free = save(quantize(build_portable("qwen2"), portable=None), tmp_path / "free")
    cases = [
        (free, r"free` is not portable: `model.layers.0.self_attn.q_proj` has 1 planes and \d+ significant columns")
    ]
    altered = tmp_path / "altered"
    shutil.copytree(exported("qwen2")[0], altered)
    tensors = load_file(altered / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.col_scale"][0, 3] += 5
    save_file(tensors, altered / "model.safetensors", metadata={"format": "pt"})
    cases.append((altered, r"tensors of the checkpoint .* were altered"))
    config = json.loads((altered / "config.json").read_text())
    config["quantization_config"]["checksums"] = None
    unchecked = tmp_path / "unchecked"
    shutil.copytree(altered, unchecked)
    (unchecked / "config.json").write_text(json.dumps(config))
    cases.append((unchecked, r"unchecked` is not portable: `model.layers.1.mlp.down_proj` has column scales"))
    dense = tmp_path / "dense"
    save(build_portable("qwen2"), dense)
    cases.append((dense, r"dense` holds dense weights"))
    for folder, message in cases:
        with pytest.raises(ValueError, match=message):
            export_gguf(folder, tmp_path / "out.gguf")
        assert not list(tmp_path.glob("*out.gguf*")), folder


def test_models_that_cannot_be_written_anew_are_refused(tmp_path):
    for family, changes, message in [
        ("gemma2", {}, r"can be written for text models of the types .*, and this one is 'gemma2'"),
        ("llama", {"hidden_act": "gelu"}, r"has the activation 'gelu' instead of 'silu', .* pass `like`"),
        ("gemma3_text", {"query_pre_attn_scalar": 7}, r"has `query_pre_attn_scalar` 7 instead of 32"),
        ("phi3", {"partial_rotary_factor": 0.5}, r"has rotary positions on 0.5 of each head, .* pass `like`"),
    ]:
        packed = save(quantize(build_portable(family, **changes)), tmp_path / family)
        with pytest.raises(ValueError, match=message):
            export_gguf(packed, tmp_path / "out.gguf")
        assert not list(tmp_path.glob("*out.gguf*"))


def test_tokenizers_that_llama_cpp_does_not_know_are_refused(exported, tmp_path):
    packed = tmp_path / "packed"
    shutil.copytree(exported("qwen3")[0], packed)
    content = json.loads((packed / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, content["pre_tokenizer"]]}
    (packed / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"the tokenizer splits texts in a way that is not known here, .* pass `like`"):
        export_gguf(packed, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*out.gguf*"))


def test_a_checkpoint_without_a_tokenizer_takes_that_of_a_file(exported, original, tmp_path):
    packed = tmp_path / "packed"
    shutil.copytree(exported("qwen3")[0], packed)
    for file in packed.glob("*token*"):
        file.unlink()
    with pytest.raises(OSError, match=r"packed` has no tokenizer beside its weights .* or pass `like`"):
        export_gguf(packed, tmp_path / "a.gguf")
    export_gguf(packed, tmp_path / "a.gguf", like=original("qwen3"))
    assert "tokenizer.ggml.tokens" in gguf.GGUFReader(tmp_path / "a.gguf").fields


def test_nothing_is_overwritten_or_left_behind(exported, monkeypatch, tmp_path):
    packed, _ = exported("qwen2")
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(ValueError, match=r"there.gguf` exists, and an export replaces nothing"):
        export_gguf(packed, tmp_path / "there.gguf")
    assert (tmp_path / "there.gguf").read_text() == "mine"
    with pytest.raises(OSError, match="is no folder that can be written"):
        export_gguf(packed, tmp_path / "none" / "a.gguf")
    with pytest.raises(ValueError, match="`embedding` must be one of"):
        export_gguf(packed, tmp_path / "a.gguf", embedding="q2")

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="no space left"):
        export_gguf(packed, tmp_path / "a.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]


def test_a_missing_package_is_named(exported, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"need the package `gguf`: `pip install \"sab_hf\[gguf\]\"`"):
        export_gguf("anything", tmp_path / "a.gguf")


def test_the_command_writes_the_same_file(exported, original, capsys, tmp_path):
    packed, path = exported("llama")
    assert cli.main(["export", "gguf", str(packed), str(tmp_path / "a.gguf"), "--embedding", "f16", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (tmp_path / "a.gguf").read_bytes() == path.read_bytes()
    assert said["path"] == str(tmp_path / "a.gguf")
    assert said["num_bytes"] == path.stat().st_size
    assert cli.main(["export", "gguf", str(packed), str(tmp_path / "b.gguf"), "--like", str(original("llama"))]) == 0
    assert "MiB Q1_0" in capsys.readouterr().out
    assert cli.main(["export", "gguf", str(packed), str(tmp_path / "b.gguf")]) == 1
    assert "exists, and an export replaces nothing" in capsys.readouterr().err
    assert cli.main(["export", "gguf", str(tmp_path / "none"), str(tmp_path / "c.gguf")]) == 1
    assert "there is no folder" in capsys.readouterr().err
