"""Quantize while loading, save, load: the same tensors, the same logits, the same answers, and nothing dense left behind."""

from __future__ import annotations

import copy
import gc
import json
import weakref

import helpers
import pytest
import torch
import transformers
from helpers import V5, build_llava, file_entries, generate, load, logits, packed_linears
from safetensors.torch import load_file
from torch import nn

import sab_hf
from sab_hf import packing
from sab_hf.anatomy.roles import find_roles
from sab_hf.anatomy.selection import language_linears
from sab_hf.packed.embedding import SABEmbedding
from sab_hf.packed.linear import SABLinear, SABModule
from sab_hf.passes.capture import BlockInputs


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


# ---- there and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "num_planes"), [(None, 1), (4.0, 2)])
def test_reloaded_model_is_bitwise_the_saved_one(vlm_dir, make_config, inputs, tmp_path, dtype, bits, num_planes):
    model = load(vlm_dir, dtype, quantization_config=make_config(bits=bits))
    linears = packed_linears(model)
    assert len(linears) == 7 * helpers.NUM_BLOCKS
    assert {linear.num_planes for linear in linears.values()} == {num_planes}
    assert {linear.num_significant > 0 for linear in linears.values()} >= {True}  # residual planes are stored
    expected, tokens = logits(model, inputs), generate(model, inputs)
    for max_shard_size in ("5GB", "20KB"):
        folder = tmp_path / max_shard_size
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        assert (len(list(folder.glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")
        again = load(folder, dtype)
        assert_same_tensors(model.state_dict(), again.state_dict())
        assert torch.equal(logits(again, inputs), expected)
        assert generate(again, inputs) == tokens
        assert again.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refined_model_survives_the_round_trip(vlm_dir, make_config, inputs, tmp_path, dtype):
    """Refinement trains biases and norms, too."""
    model = load(vlm_dir, dtype, quantization_config=make_config(refine_steps=3))
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    assert dtypes == {dtype}
    assert len(packed_linears(model)) == 7 * helpers.NUM_BLOCKS
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype)
    assert_same_tensors(model.state_dict(), again.state_dict())
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert generate(again, inputs) == generate(model, inputs)


def test_refinement_in_bfloat16_keeps_the_precision_of_scales(vlm_dir, make_config):
    """Scales are stored in float16; rounding them to the model's bfloat16 on the way would lose three bits."""
    model = load(vlm_dir, torch.bfloat16, quantization_config=make_config(refine_steps=3))
    scales = torch.cat([m.row_scale.view(torch.float16).flatten() for m in packed_linears(model).values()])
    assert (scales != scales.bfloat16().half()).float().mean() > 0.5


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_device_map_changes_nothing(vlm_dir, packed_dir, make_config, inputs, device_map):
    """Against the checkpoint that was made without one."""
    reference = logits(load(packed_dir), inputs)
    assert torch.equal(logits(load(packed_dir, device_map=device_map), inputs), reference)
    quantized = load(vlm_dir, quantization_config=make_config(), device_map=device_map)
    assert torch.equal(logits(quantized, inputs), reference)


def test_packed_blocks_run_from_disk(packed_dir, inputs, tmp_path):
    in_memory = load(packed_dir)
    device_map = {name: "cpu" for name, _ in in_memory.named_modules() if name.count(".") == 1}
    device_map |= {"lm_head": "cpu"}
    del device_map["model.language_model"]
    parts = [f"model.language_model.{name}" for name, _ in in_memory.model.language_model.named_children()]
    device_map |= dict.fromkeys(parts, "cpu")
    del device_map["model.language_model.layers"]
    device_map |= {"model.language_model.layers.0": "cpu", "model.language_model.layers.1": "disk"}
    offloaded = load(packed_dir, device_map=device_map, offload_folder=tmp_path / "offload")
    assert {linear.signs.is_meta for linear in packed_linears(offloaded).values()} == {True, False}
    assert torch.equal(logits(offloaded, inputs), logits(in_memory, inputs))
    assert generate(offloaded, inputs) == generate(in_memory, inputs)


def test_dtype_of_loading_leaves_packed_tensors_alone(packed_dir):
    one, other = (packed_linears(load(packed_dir, dtype)) for dtype in (torch.float32, torch.bfloat16))
    for name, linear in one.items():
        assert_same_tensors(linear.packed_tensors(), other[name].packed_tensors())


@pytest.mark.parametrize(("dtype", "refine_steps"), [(torch.float32, 1), (torch.bfloat16, 0), (torch.bfloat16, 1)])
def test_packed_weights_answer_the_dtype_of_the_model(vlm_dir, make_config, tmp_path, dtype, refine_steps):
    """Quantized while loading, refined or not, and loaded again in another dtype; embeddings and towers too."""
    quantized = load(vlm_dir, dtype, quantization_config=make_config(rest_bits=2, refine_steps=refine_steps))
    quantized.save_pretrained(tmp_path)
    for model, expected in ((quantized, dtype), (load(tmp_path, torch.float16), torch.float16)):
        packed = [module for module in model.modules() if isinstance(module, SABModule)]
        assert {type(module) for module in packed} == {SABLinear, SABEmbedding}
        assert {module.weight.dtype for module in packed} == {expected}
        assert {module.weight.dtype for module in model.to(torch.float32).modules() if module in packed} == {
            torch.float32
        }


def test_saving_again_writes_the_same_tensors(packed_dir, tmp_path):
    load(packed_dir).save_pretrained(tmp_path)
    assert_same_tensors(load_file(packed_dir / "model.safetensors"), load_file(tmp_path / "model.safetensors"))
    before, after = (json.loads((path / "config.json").read_text()) for path in (packed_dir, tmp_path))
    assert before["quantization_config"] == after["quantization_config"]


def test_same_seed_gives_the_same_file(vlm_dir, packed_dir, make_config, tmp_path):
    load(vlm_dir, quantization_config=make_config()).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (packed_dir / "model.safetensors").read_bytes()


def test_file_holds_what_the_format_says(packed_dir):
    entries = file_entries(packed_dir)
    config = json.loads((packed_dir / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "sab"
    assert config["format_version"] == packing.FORMAT_VERSION
    model = build_llava(attention_bias=True)
    names = {torch.uint8: "U8", torch.int16: "I16"}
    markers = 0
    for name, (num_planes, num_significant) in config["modules"].items():
        weight = model.get_submodule(name).weight
        (stored,) = {key.rpartition(".")[0] for key in entries if _same_module(key, name)}
        for tensor, (dtype, shape) in packing.tensor_specs(*weight.shape, num_planes, num_significant).items():
            assert (entries[f"{stored}.{tensor}"]["dtype"], entries[f"{stored}.{tensor}"]["shape"]) == (
                names[dtype],
                list(shape),
            )
        if f"{stored}.weight" in entries:
            assert entries[f"{stored}.weight"]["shape"] == [0]  # the marker
            markers += 1
        assert (f"{stored}.bias" in entries) == ("self_attn" in name)
    assert markers == 1


def _same_module(key: str, name: str) -> bool:
    tail = name[name.index("layers.") :]
    return key.startswith("language_model") and f"{tail}." in key


def test_vision2seq_name_loads_a_packed_checkpoint(packed_dir, inputs):
    reference = logits(load(packed_dir), inputs)
    loaders = [sab_hf.AutoModelForVision2Seq]
    if not V5:
        loaders.append(transformers.AutoModelForVision2Seq)
    for loader in loaders:
        model = loader.from_pretrained(packed_dir, dtype=torch.float32)
        assert torch.equal(logits(model, inputs), reference)


def test_tied_embeddings_survive(make_config, inputs, tmp_path):
    dense = helpers.save_dense(build_llava(tied=True, tie_word_embeddings=True), tmp_path / "dense")
    model = load(dense, quantization_config=make_config())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_skipped_modules_stay_dense(vlm_dir, make_config, inputs, tmp_path):
    config = make_config(modules_to_not_convert=["layers.0", "down_proj"], allow_low_coverage=True)
    model = load(vlm_dir, quantization_config=config)
    names = set(packed_linears(model))
    assert names == {
        f"model.language_model.layers.1.{name}"
        for name in (*(f"self_attn.{letter}_proj" for letter in "qkvo"), "mlp.gate_proj", "mlp.up_proj")
    }
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert packed_linears(again).keys() == names
    assert torch.equal(logits(again, inputs), logits(model, inputs))


# ---- in memory


def test_quantizing_in_memory_equals_quantizing_while_loading(
    vlm_dir, packed_dir, make_config, processor, inputs, tmp_path
):
    model = load(vlm_dir)
    record = sab_hf.quantize(model, processor, None, make_config())
    assert_same_tensors(model.state_dict(), load(packed_dir).state_dict())
    assert [fit.name for fit in record.fits] == list(packed_linears(model))
    assert all(0 < fit.error < 1 and fit.tokens.keys() == {"text", "image"} for fit in record.fits)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path), inputs), logits(model, inputs))


def test_samples_argument_wins_over_the_config_s(model, processor, make_config, samples):
    other = copy.deepcopy(model)
    sab_hf.quantize(model, processor, samples[:2], make_config(calibration="builtin", num_samples=2))
    sab_hf.quantize(other, processor, None, make_config(calibration=samples[:2], num_samples=2))
    assert_same_tensors(model.state_dict(), other.state_dict())


def test_quantized_outputs_are_those_of_the_dense_stand_in(vlm_dir, packed_dir, inputs):
    """Against a plain transformers model with `planes().dense()` as its weights."""
    packed, reference = load(packed_dir), load(vlm_dir)
    for name, linear in packed_linears(packed).items():
        reference.get_submodule(name).weight = nn.Parameter(linear.planes().dense())
    torch.testing.assert_close(logits(packed, inputs), logits(reference, inputs), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(packed, inputs), logits(load(vlm_dir), inputs), rtol=1e-2)


def test_training_mode_is_left_as_it_was(model, processor, make_config):
    model.train()
    sab_hf.quantize(model, processor, None, make_config())
    assert all(module.training for module in model.modules())


def test_copy_of_a_quantized_model_works(packed_dir, inputs):
    model = load(packed_dir)
    assert torch.equal(logits(copy.deepcopy(model), inputs), logits(model, inputs))


# ---- back to dense


@pytest.mark.parametrize("origin", ["loaded packed", "quantized while loading", "quantized in memory"])
def test_dequantized_model_is_a_plain_dense_one(vlm_dir, packed_dir, make_config, processor, inputs, tmp_path, origin):
    if origin == "loaded packed":
        model = load(packed_dir)
    elif origin == "quantized while loading":
        model = load(vlm_dir, quantization_config=make_config())
    else:
        model = load(vlm_dir)
        sab_hf.quantize(model, processor, None, make_config())
    expected = logits(model, inputs)
    model.dequantize()
    assert not packed_linears(model)
    assert not getattr(model, "is_quantized", False)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-4)

    model.save_pretrained(tmp_path)
    assert "sab" not in (tmp_path / "config.json").read_text()
    assert file_entries(tmp_path).keys() == file_entries(vlm_dir).keys()
    again = load(tmp_path)
    assert not hasattr(again, "hf_quantizer")
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_dequantized_model_can_be_quantized_again(packed_dir, processor, make_config, inputs):
    model = load(packed_dir)
    model.dequantize()
    sab_hf.quantize(model, processor, None, make_config())
    assert len(packed_linears(model)) == 7 * helpers.NUM_BLOCKS


# ---- no dense weight stays


def test_no_dense_parameter_of_a_packed_linear_is_left(vlm_dir, make_config):
    dense = load(vlm_dir)
    sizes = {name: p.nbytes for name, p in dense.named_parameters()}
    model = load(vlm_dir, quantization_config=make_config())
    names = packed_linears(model).keys()
    assert names
    rest = sum(size for name, size in sizes.items() if name.removesuffix(".weight") not in names)
    packed = sum(packing.stored_bytes(m.out_features, m.in_features, m.num_planes, m.num_significant)
                 for m in packed_linears(model).values())  # fmt: skip
    assert sum(p.nbytes for p in model.parameters()) == rest + packed
    assert not any(p.is_floating_point() for m in packed_linears(model).values() for p in m.packed_tensors().values())


def test_dense_weights_die_block_by_block(model, processor, make_config, monkeypatch):
    """When a block is done, the dense weights of all blocks before it are gone, without the garbage collector's help."""
    linears = language_linears(model, find_roles(model), [])
    weights = {name: weakref.ref(linear.weight) for name, linear in linears.items()}
    del linears
    seen = []
    original = BlockInputs.advance

    def spy(self, block, index):
        alive = {int(name.split(".layers.")[1][0]) for name, weight in weights.items() if weight() is not None}
        seen.append((index, alive))
        return original(self, block, index)

    monkeypatch.setattr(BlockInputs, "advance", spy)
    gc.disable()
    try:
        sab_hf.quantize(model, processor, None, make_config(significance="paper"))
    finally:
        gc.enable()
    assert [index for index, _ in seen] == [0]
    assert all(min(alive) > index for index, alive in seen)
    assert [name for name, weight in weights.items() if weight() is not None] == []


def test_loading_leaves_no_hidden_dense_tensor(vlm_dir, make_config):
    """No tensor as large as the smallest packed matrix survives outside the model."""
    before = {id(t) for t in _living_tensors()}
    model = load(vlm_dir, quantization_config=make_config())
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    smallest = min(m.out_features * m.in_features for m in packed_linears(model).values())
    strangers = [t for t in _living_tensors() if id(t) not in before and t.untyped_storage().data_ptr() not in own]
    assert [tuple(t.shape) for t in strangers if t.numel() >= smallest] == []


def _living_tensors() -> list[torch.Tensor]:
    gc.collect()
    return [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
