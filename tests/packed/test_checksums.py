"""Damage of every kind to a saved checkpoint: an error or the very same model, never another one in silence."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import fuzz_checkpoints
import pytest
import torch
import transformers
from helpers import (
    BLOCKS,
    CPU,
    V5,
    build_llava,
    load,
    logits,
    save_dense,
)
from processes import forked
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from sab_hf.packed import checksums as integrity
from sab_hf.publish.inspect import inspect


def files_of(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def rewrite(path: Path, change) -> None:
    """Change the tensors of the one weights file of a checkpoint, keeping all else."""
    (file,) = files_of(path)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def copied(packed_dir, tmp_path) -> Path:
    shutil.copytree(packed_dir, tmp_path / "copy")
    return tmp_path / "copy"


# ---- what is recorded


def test_checksums_cover_every_tensor_of_the_file(packed_dir):
    checksums = json.loads((packed_dir / "config.json").read_text())["quantization_config"]["checksums"]
    with safe_open(files_of(packed_dir)[0], framework="pt") as reader:
        groups = {integrity.part_of(name) for name in reader.keys()}  # noqa: SIM118
    assert checksums["tensors"].keys() == groups
    assert checksums["aliases"] == {}


def test_untouched_checkpoint_loads_and_says_nothing(packed_dir, caplog):
    model, info = AutoModelForImageTextToText.from_pretrained(packed_dir, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert "checksums" not in caplog.text
    assert model.config.quantization_config.checksums is not None


def test_marker_is_at_a_layer_of_a_block_that_is_no_expert():
    names = ["lm_head", "model.layers.0.mlp.experts.3.up_proj", "model.layers.1.self_attn.q_proj", "model.embed_tokens"]
    assert integrity.marker(names) == "model.layers.1.self_attn.q_proj.weight"
    assert integrity.marker(["lm_head", "embed_tokens"]) == "embed_tokens.weight"


def test_tied_weights_are_sealed_once(make_config, tmp_path, inputs):
    dense = save_dense(build_llava(tied=True, tie_word_embeddings=True), tmp_path / "dense")
    model = load(dense, quantization_config=make_config())
    model.save_pretrained(tmp_path / "packed")
    aliases = model.config.quantization_config.checksums["aliases"]
    assert len(aliases) == 1
    assert torch.equal(logits(load(tmp_path / "packed"), inputs), logits(model, inputs))


@pytest.mark.skipif(not V5, reason="transformers 4.57 cannot save offloaded models whose tensors it renames")
def test_saving_an_offloaded_model_writes_no_checksums_and_says_so(packed_dir, tmp_path, caplog, inputs):
    device_map = {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "cpu",
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.rotary_emb": "cpu",
        "model.language_model.norm": "cpu",
        "model.language_model.layers.0": "cpu",
        "model.language_model.layers.1": "disk",
        "lm_head": "cpu",
    }
    offloaded = load(packed_dir, device_map=device_map, offload_folder=tmp_path / "offload")
    with pytest.warns(UserWarning, match="offloaded"):
        offloaded.save_pretrained(tmp_path / "saved")
    assert "saved without checksums" in caplog.text
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quantization_config"]["checksums"] is None
    assert torch.equal(logits(load(tmp_path / "saved"), inputs), logits(load(packed_dir), inputs))


@pytest.mark.skipif(not V5, reason="transformers 4.57 always saves under the original names")
def test_files_under_the_model_s_own_names_are_checked_too(packed_dir, tmp_path, inputs):
    load(packed_dir).save_pretrained(tmp_path, save_original_format=False)
    with safe_open(files_of(tmp_path)[0], framework="pt") as reader:
        assert "model.language_model.norm.weight" in reader.keys()  # noqa: SIM118
    assert torch.equal(logits(load(tmp_path), inputs), logits(load(packed_dir), inputs))
    assert inspect(tmp_path, verify=True).checksums == "verified"
    rewrite(tmp_path, lambda tensors: tensors["model.language_model.norm.weight"].mul_(2))
    with pytest.raises(ValueError, match=r"first `language_model\.model\.norm`"):
        load(tmp_path)


@pytest.mark.skipif(not V5, reason="transformers 4.57 always saves under the original names")
def test_files_under_the_model_s_own_names_are_checked_where_those_of_the_original_had_a_prefix(
    vlm_dir, make_config, tmp_path
):
    def add_prefix(tensors):
        for name in [name for name in tensors if name.startswith("vision_tower.")]:
            tensors[name.replace(".", ".vision_model.", 1)] = tensors.pop(name)

    shutil.copytree(vlm_dir, tmp_path / "dense")
    rewrite(tmp_path / "dense", add_prefix)
    model = load(tmp_path / "dense", quantization_config=make_config())
    model.save_pretrained(tmp_path / "packed", save_original_format=False)
    checksums = model.config.quantization_config.checksums["tensors"]
    assert "vision_tower.vision_model.post_layernorm" in checksums
    load(tmp_path / "packed")
    assert inspect(tmp_path / "packed", verify=True).checksums == "verified"
    rewrite(tmp_path / "packed", lambda tensors: tensors["model.vision_tower.post_layernorm.weight"].mul_(2))
    with pytest.raises(ValueError, match=r"for 1 of \d+ parts, first `vision_tower\.vision_model\.post_layernorm`"):
        load(tmp_path / "packed")


# ---- what is found


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
        "multi_modal_projector.linear_1.bias",
        "language_model.model.layers.1.mlp.up_proj.signs",
        "language_model.model.layers.0.self_attn.q_proj.bias",
    ],
)
def test_one_changed_number_is_found_and_its_part_named(copied, name):
    def change(tensors):
        flat = tensors[name].view(torch.uint8).reshape(-1)
        flat[len(flat) // 2] ^= 1

    rewrite(copied, change)
    with pytest.raises(ValueError, match=rf"checksums differ for 1 of \d+ parts, first `{integrity.part_of(name)}`"):
        load(copied)


def test_missing_dense_tensor_is_an_error(copied):
    rewrite(copied, lambda tensors: tensors.pop("language_model.model.norm.weight"))
    with pytest.raises(ValueError, match=r"altered, lost or added .*first `language_model\.model\.norm`"):
        load(copied)


def test_swapped_dense_tensors_are_an_error(copied):
    def swap(tensors):
        names = [f"language_model.model.layers.{i}.self_attn.q_proj.bias" for i in (0, 1)]
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]

    rewrite(copied, swap)
    with pytest.raises(ValueError, match="checksums differ for 2 of"):
        load(copied)


@pytest.mark.parametrize("part", ["text_config", "vision_config", None])
def test_changed_config_is_an_error(copied, part):
    content = json.loads((copied / "config.json").read_text())
    target = content if part is None else content[part]
    key = {"text_config": "rms_norm_eps", "vision_config": "layer_norm_eps", None: "vision_feature_layer"}[part]
    target[key] = -2 if part is None else 0.1
    (copied / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config\.json was altered .*set `checksums` .* to null"):
        load(copied)


def test_meant_changes_can_be_allowed(copied):
    content = json.loads((copied / "config.json").read_text())
    content["text_config"]["rms_norm_eps"] = 0.1
    content["quantization_config"]["checksums"] = None
    (copied / "config.json").write_text(json.dumps(content))
    assert load(copied).config.text_config.rms_norm_eps == 0.1


def test_formatting_of_the_config_is_free(copied):
    content = json.loads((copied / "config.json").read_text())
    content["transformers_version"] = "99"
    (copied / "config.json").write_text(json.dumps(content, indent=7))
    load(copied)


def test_loading_without_the_plugin_raises(packed_dir):
    """The marker: a weight of the wrong shape, where transformers would only warn and initialize randomly."""

    def load_without() -> None:
        transformers.logging.set_verbosity_warning()
        transformers.logging.add_handler(logging.StreamHandler())  # for the table of what does not fit
        del AUTO_QUANTIZATION_CONFIG_MAPPING["sab"], AUTO_QUANTIZER_MAPPING["sab"]
        load(packed_dir)

    done = forked(load_without)
    assert done.returncode != 0
    assert "sab" in done.stderr
    assert "ismatch" in done.stderr


# ---- the files that are loaded are the files that are checked


def flip(file: Path, name: str = "language_model.model.norm.weight") -> None:
    tensors = load_file(file)
    tensors[name].view(torch.uint8).reshape(-1)[3] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("max_shard_size", ["1GB", "30KB"])
@pytest.mark.parametrize(
    "where", [{"subfolder": "inner"}, {"variant": "half"}, {"subfolder": "inner", "variant": "half"}]
)
def test_subfolders_and_variants_are_checked(packed_dir, tmp_path, inputs, where, max_shard_size):
    model = load(packed_dir)
    folder = tmp_path / where.get("subfolder", "")
    model.save_pretrained(folder, variant=where.get("variant"), max_shard_size=max_shard_size)
    files = files_of(folder)
    assert (len(files) > 1) == (max_shard_size == "30KB")
    if "variant" in where:  # what is not loaded is beside it, and is not checked
        for file in files_of(packed_dir):
            shutil.copy(file, folder)
            flip(folder / file.name)
    assert torch.equal(logits(load(tmp_path, **where), inputs), logits(model, inputs))
    with safe_open(files[-1], framework="pt") as reader:
        name = next(name for name in reader.keys() if reader.get_tensor(name).numel())  # noqa: SIM118
    flip(files[-1], name)
    with pytest.raises(ValueError, match=r"altered, lost or added after it was saved"):
        load(tmp_path, **where)


def test_an_index_of_a_variant_that_lacks_a_tensor_is_an_error(packed_dir, tmp_path):
    load(packed_dir).save_pretrained(tmp_path, variant="half", max_shard_size="30KB")
    index = tmp_path / "model.safetensors.index.half.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["language_model.model.norm.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"index\.half\.json and the files beside it differ in 1 tensors, first `language_model"
    ):
        load(tmp_path, variant="half")


def test_weights_that_come_from_no_file_cannot_be_checked(packed_dir):
    model, config = load(packed_dir), AutoConfig.from_pretrained(packed_dir)
    with pytest.raises(ValueError, match=r"files that it is loaded from are not known.* set `checksums` .* to None"):
        type(model).from_pretrained(None, config=config, state_dict=model.state_dict())


# ---- without checksums


OFFLOADED = {**CPU, f"{BLOCKS}.0": "cpu", f"{BLOCKS}.1": "disk"} if V5 else None
"""transformers 4.57 cannot offload files whose tensors it renames, as those of LLaVA."""
DOWN = "language_model.model.layers.1.mlp.down_proj"


def test_a_checkpoint_without_checksums_loads_with_one_warning(damage, caplog, inputs, packed_dir):
    model = load(damage())
    assert [record.message for record in caplog.records if "has no checksums" in record.message] == [
        caplog.records[-1].message
    ]
    assert torch.equal(logits(model, inputs), logits(load(packed_dir), inputs))


@pytest.mark.parametrize("name", ["row_scale", "col_scale", "residual_row_scale", "residual_col_scale"])
@pytest.mark.parametrize("value", [0x7C00, 0x7E01, -0x0400])  # infinity, not a number, minus infinity
@pytest.mark.parametrize("device_map", [None, OFFLOADED], ids=["in memory", "offloaded"])
def test_scales_that_are_not_finite_are_found(damage, tmp_path, name, value, device_map):
    path = damage(tensors=lambda tensors: tensors[f"{DOWN}.{name}"].view(-1)[-1:].fill_(value))
    with pytest.raises(ValueError, match=rf"{DOWN}\.{name}` in .* holds scales that are not finite"):
        load(path, device_map=device_map, offload_folder=tmp_path / "offload" if device_map else None)
    with pytest.raises(ValueError, match="holds scales that are not finite"):
        inspect(path, verify=True)


@pytest.mark.parametrize("device_map", [None, OFFLOADED], ids=["in memory", "offloaded"])
@pytest.mark.parametrize("byte", [0, 255])
def test_masks_that_do_not_fit_are_found(damage, tmp_path, byte, device_map):
    path = damage(tensors=lambda tensors: tensors[f"{DOWN}.significant_columns"].fill_(byte))
    with pytest.raises(ValueError, match=r"down_proj`: `significant_columns` must mark \d+ columns, .* got (0|88)"):
        load(path, device_map=device_map, offload_folder=tmp_path / "offload" if device_map else None)


@pytest.mark.parametrize("device_map", [None, OFFLOADED], ids=["in memory", "offloaded"])
@pytest.mark.parametrize("count", [89, 4000, 2**40])
def test_more_significant_columns_than_columns_are_refused(damage, tmp_path, count, device_map):
    """Such operands made the kernels write past their memory."""
    stored = min(count, 4000)

    def widen(tensors):
        rows = tensors[f"{DOWN}.row_scale"].shape[1]
        tensors[f"{DOWN}.residual_signs"] = torch.zeros(rows, -(-stored // 8), dtype=torch.uint8)
        tensors[f"{DOWN}.residual_col_scale"] = torch.zeros(stored, dtype=torch.int16)

    path = damage(widen, lambda config: config["modules"].update({f"model.{DOWN.replace('.model', '')}": [1, count]}))
    with pytest.raises(ValueError, match=rf"down_proj`, a Linear of 88 columns, {count} significant columns"):
        load(path, device_map=device_map, offload_folder=tmp_path / "offload" if device_map else None)


# ---- files beside the weights


@pytest.fixture
def saved_copy(saved, tmp_path) -> Path:
    shutil.copytree(saved, tmp_path / "saved")
    return tmp_path / "saved"


def test_files_beside_the_weights_are_verified(saved_copy):
    found = inspect(saved_copy, verify=True)
    assert found.checksums == "verified"
    assert {"weights", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} < set(
        found.covered
    )
    assert "README.md" in found.not_covered
    assert not set(found.covered) & set(found.not_covered)
    assert "\nverified: weights, config.json, " in str(found)
    assert "\nin no checksum: README.md" in str(found)
    assert load(saved_copy) is not None


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_an_altered_or_lost_file_beside_the_weights_is_named(saved_copy, name):
    content = (saved_copy / name).read_bytes()
    (saved_copy / name).write_bytes(content.replace(b"e", b"a", 1))
    with pytest.raises(ValueError, match=rf"{name} was altered after it was saved"):
        inspect(saved_copy, verify=True)
    (saved_copy / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing, which was saved with the checkpoint"):
        inspect(saved_copy, verify=True)
    (saved_copy / name).write_bytes(content)
    assert inspect(saved_copy, verify=True).checksums == "verified"


def test_checkpoints_whose_checksums_know_no_other_files_are_verified_and_say_so(packed_dir):
    found = inspect(packed_dir, verify=True)
    assert found.checksums == "verified"
    assert found.covered == ("weights", "config.json")
    assert {"tokenizer.json", "generation_config.json"} < set(found.not_covered)
    assert "in no checksum: " in str(found)


@pytest.mark.parametrize("name", ["/etc/passwd", "../config.json", "a\\b"])
def test_names_of_files_beside_the_weights_stay_in_the_folder(saved_copy, name):
    content = json.loads((saved_copy / "config.json").read_text())
    content["quantization_config"]["checksums"]["files"][name] = "0"
    (saved_copy / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="`checksums` must be"):
        inspect(saved_copy, verify=True)


# ---- damage at random (`fuzz_checkpoints.py` does it at length)


@pytest.mark.parametrize("name", fuzz_checkpoints.CASES)
def test_damaged_checkpoints_are_errors_or_identical(name, tmp_path, inputs):
    case, count = fuzz_checkpoints.CASES[name], 16
    with fuzz_checkpoints.silence():
        results = list(fuzz_checkpoints.fuzz(case, count, inputs, tmp_path))
    assert [what for what, found in results if found == fuzz_checkpoints.DIFFERS] == []
    assert results[0][1] != "error"  # the first one is left as it is
    assert sum(found.startswith("error") for _, found in results) > count / 2
    assert_packed_as_asked(case, tmp_path / "whole")


def assert_packed_as_asked(case, whole):
    """Else what is damaged would not be what the case says."""
    config = json.loads((whole / "config.json").read_text())["quantization_config"]
    assert any("layers" not in name for name in config["modules"]) == (case.rest_bits < 16)
    assert bool(config["tied_head"]) == (case.kind == "tied llama" and case.rest_bits < 16)
    assert case.beside or len(fuzz_checkpoints.victims(case, whole)) > 3
