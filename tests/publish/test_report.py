"""Reported sizes are those of the files, byte for byte."""

from __future__ import annotations

import json

import helpers
import pytest
import torch
from helpers import build_llama, build_llava, file_bytes, file_entries, load, packed_linears

import sab_hf
from sab_hf import report


def tensor_bytes(path, belongs) -> int:
    """Sum the bytes of the tensors in the files of a folder whose name `belongs`."""
    spans = [entry["data_offsets"] for name, entry in file_entries(path).items() if belongs(name)]
    return sum(end - start for start, end in spans)


def is_packed(name: str) -> bool:
    return "layers." in name and name.rpartition(".")[2] not in ("weight", "bias") and name.startswith("language_model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [None, 4.0])
@pytest.mark.parametrize("tied", [False, True])
def test_totals_are_the_bytes_of_the_file(make_config, tmp_path, dtype, bits, tied):
    model = build_llava(attention_bias=True, tied=tied, tie_word_embeddings=tied)
    dense = helpers.save_dense(model, tmp_path / "dense")
    model = load(dense, dtype, quantization_config=make_config(bits=bits))
    packed = tmp_path / "packed"
    model.save_pretrained(packed, max_shard_size="30KB")
    sizes = report(model)
    assert sizes.total_bytes == file_bytes(packed)
    assert report(load(packed, dtype)) == sizes

    roles = sizes.roles
    assert sum(role.quantized_bytes + role.dense_bytes for role in roles.values()) == sizes.total_bytes
    assert roles["language"].quantized_bytes == tensor_bytes(packed, is_packed) > 0
    assert roles["vision"].dense_bytes == tensor_bytes(packed, lambda name: name.startswith("vision_tower."))
    assert roles["projector"].dense_bytes == tensor_bytes(
        packed, lambda name: name.startswith("multi_modal_projector.")
    )
    assert roles["embedding"].dense_bytes == tensor_bytes(packed, lambda name: "embed_tokens" in name)
    assert ("head" in roles) != tied
    if tied:
        assert not any("lm_head" in name for name in file_entries(packed))
    else:
        assert roles["head"].dense_bytes == tensor_bytes(packed, lambda name: "lm_head" in name)


def test_bits_of_each_module_are_those_of_its_tensors(packed_dir):
    model = load(packed_dir)
    sizes = report(model)
    assert [module.name for module in sizes.modules] == list(packed_linears(model))
    for module in sizes.modules:
        tail = module.name[module.name.index("layers.") :]
        stored = tensor_bytes(packed_dir, lambda name, tail=tail: is_packed(name) and f"{tail}." in name)
        linear = model.get_submodule(module.name)
        assert module.role == "language"
        assert module.stored_bytes == stored
        assert module.bits == 8 * stored / (linear.out_features * linear.in_features)
        assert (module.num_planes, module.num_significant) == (linear.num_planes, linear.num_significant)
    weights = sum(module.num_weights for module in sizes.modules)
    assert sizes.bits == sizes.roles["language"].bits == 8 * tensor_bytes(packed_dir, is_packed) / weights


def test_bits_asked_for_are_an_upper_bound(vlm_dir, make_config):
    asked = (1.75, 2.2, 3.4, 4.5)
    got = [report(load(vlm_dir, quantization_config=make_config(bits=bits))).bits for bits in asked]
    assert all(have <= bits for have, bits in zip(got, asked, strict=True))
    assert got == sorted(set(got))  # more is better spent


def test_dense_model_has_no_quantized_bits(vlm_dir):
    sizes = report(load(vlm_dir))
    assert sizes.modules == []
    assert sizes.total_bytes == file_bytes(vlm_dir)
    assert all(role.bits is None for role in sizes.roles.values())
    assert sizes.bits != sizes.bits  # nan


def test_text_only_model_is_counted(tmp_path):
    model = build_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    sizes = report(model)
    assert sizes.total_bytes == file_bytes(tmp_path)
    assert sizes.roles.keys() == {"embedding", "language"}


def test_report_as_json_and_as_a_table(packed_dir):
    sizes = report(load(packed_dir))
    plain = json.loads(sizes.to_json())
    assert plain == sizes.to_dict()
    assert plain["bits"] == sizes.bits
    assert plain["roles"]["language"]["bits"] == sizes.roles["language"].bits
    assert plain["modules"][0]["bits"] == sizes.modules[0].bits
    table = str(sizes)
    assert f"{sizes.bits:.3f}" in table
    assert all(role in table for role in sizes.roles)


def test_a_plain_model_has_no_line_about_coverage(make_config, processor):
    model = build_llava()
    sab_hf.quantize(model, processor, None, make_config())
    assert sab_hf.report(model).coverage.share == 1
    assert "language weights" not in str(sab_hf.report(model))
