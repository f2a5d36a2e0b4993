"""Bad input of every kind: what is wrong, where, and how to correct it, before hours are spent and never in silence."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import V5, build_llama, build_llava, build_tokenizer, load, logits, packed_linears
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

import sab_hf
from sab_hf import SABQuantizationConfig
from sab_hf.publish.inspect import inspect

DOWN = "language_model.model.layers.0.mlp.down_proj"  # in the file
DOWN_MODULE = "model.language_model.layers.0.mlp.down_proj"  # in the model; has significant columns


class WeightsWereRead(Exception):  # noqa: N818
    pass


@pytest.fixture
def no_weights(monkeypatch):
    """Let any attempt to read the weights raise."""

    def refuse(*args, **kwargs):
        raise WeightsWereRead

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", refuse)


# ---- the config


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("bits", "1.1", "a number above 0"),
        ("bits", True, "a number above 0"),
        ("bits", 0, "a number above 0"),
        ("bits", float("nan"), "a number above 0"),
        ("bits", 100, "at most 9"),
        ("num_samples", 0, "an integer of at least 1"),
        ("num_samples", 1.5, "an integer of at least 1"),
        ("seed", -1, "an integer of at least 0"),
        ("seed", 2**70, f"an integer of at least 0 and at most {2**63 - 1}"),
        ("batch_size", True, "an integer of at least 1"),
        *[
            (field, 2**31, f"an integer of at least [01] and at most {2**31 - 1}")
            for field in ("num_samples", "max_length", "batch_size", "alternations", "block_size", "refine_steps")
        ],
        ("damping", 0, "a number at least 1e-06"),
        ("salient_top_p", 1.5, "at most 1"),
        ("fit", "magic", "one of"),
        ("allow_text_only", 1, "True or False"),
        ("modules_to_not_convert", "lm_head", "a list of module names"),
        ("modules_to_not_convert", [1], "a list of module names"),
        ("modules", {"a": [0, 1]}, "full planes"),
        ("modules", {"a": 1}, "full planes"),
    ],
)
def test_config_refuses_values(field, value, accepted):
    with pytest.raises(ValueError, match=rf"`{field}` must .*{accepted}.*, got") as error:
        SABQuantizationConfig(**{field: value})
    assert repr(value) in str(error.value)


def test_unknown_field_of_the_constructor_is_refused():
    with pytest.raises(TypeError, match="SABQuantizationConfig has no field `bit`; did you mean `bits`"):
        SABQuantizationConfig(bit=1.1)
    with pytest.raises(TypeError, match=r"has no field `xyz`; it has \['bits', "):
        SABQuantizationConfig(xyz=1)


def test_unknown_field_of_a_dict_is_refused_with_the_accepted_ones():
    with pytest.raises(ValueError, match=r"unknown fields \['bitz'\].*did you mean `bits`"):
        SABQuantizationConfig.from_dict({"bitz": 1.1})


def test_dict_of_another_method_is_refused():
    with pytest.raises(ValueError, match="`quant_method` must be 'sab', got 'gptq'"):
        SABQuantizationConfig.from_dict({"quant_method": "gptq"})


# ---- mistakes that show before the weights are read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 1.0}, r"`bits` must be at least 1\.\d+ for this model .*got 1\.0.*`modules_to_not_convert`"),
        ({"modules_to_not_convert": ["up_proj", "lm_head"]}, r"'lm_head' matches nothing .*model\.language_model\.layers\.0"),
        ({"modules_to_not_convert": ["proj"]}, r"'proj' matches nothing"),  # no whole part of a name
        ({"modules_to_not_convert": ["layers"]}, r"LlavaForConditionalGeneration has no Linear left .*shorten"),
        ({"calibration": [{"text": "no image"}]}, r"LlavaForConditionalGeneration|LlavaConfig.*allow_text_only=True"),
        ({"calibration": "nowhere"}, r"`calibration` must be .*got 'nowhere'"),
        ({"calibration": [3]}, r"sample"),
        ({"max_length": 3}, r"longer than max_length=3 .*raise `max_length` to at least \d+"),
        ({"processor": "/nowhere"}, r"processor.*'/nowhere'.*SABQuantizationConfig\(processor=\.\.\.\)"),
    ],
)  # fmt: skip
def test_mistakes_show_before_the_weights_are_read(vlm_dir, make_config, no_weights, changes, message):
    with pytest.raises(ValueError, match=message):
        load(vlm_dir, quantization_config=make_config(**changes))


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_missing_processor_shows_before_the_weights_are_read(make_config, no_weights, tmp_path, with_tokenizer):
    build_llava().save_pretrained(tmp_path)
    if with_tokenizer:
        build_tokenizer().save_pretrained(tmp_path)
    where = re.escape(str(tmp_path))
    with pytest.raises(ValueError, match=rf"needs the model's processor.*{where}.*SABQuantizationConfig\(processor="):
        load(tmp_path, quantization_config=make_config())


def test_weights_are_read_where_nothing_is_wrong(vlm_dir, make_config, no_weights):
    """Else the tests above would prove nothing."""
    with pytest.raises(WeightsWereRead):
        load(vlm_dir, quantization_config=make_config())


def test_missing_processor_can_be_passed(make_config, processor, tmp_path):
    build_llava().save_pretrained(tmp_path)
    assert packed_linears(load(tmp_path, quantization_config=make_config(processor=processor)))


def test_model_without_an_origin_needs_a_processor(model, make_config):
    with pytest.raises(
        ValueError, match=r"needs the model's processor.*from ''; pass `SABQuantizationConfig\(processor="
    ):
        sab_hf.quantize(model, None, None, make_config())


# ---- text-only models


def test_text_only_model_works_without_a_word_on_images(make_config, tmp_path, caplog):
    build_llama().save_pretrained(tmp_path / "dense")
    build_tokenizer().save_pretrained(tmp_path / "dense")
    texts = [{"text": f"Sample {i} of a few words."} for i in range(4)]
    with caplog.at_level(logging.INFO, logger="sab_hf"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", dtype=torch.float32, quantization_config=make_config(calibration=texts)
        )
    assert "(text 100.0 %)" in caplog.text
    assert "image" not in caplog.text
    assert all(fit.tokens.keys() == {"text"} for fit in model.hf_quantizer.record.fits)
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    ids = {"input_ids": torch.arange(9)[None]}
    assert torch.equal(logits(again, ids), logits(model, ids))


# ---- weights and activations


def test_nan_weight_is_named_and_nothing_is_changed(model, processor, make_config):
    model.get_submodule(DOWN_MODULE.replace("0.mlp", "1.mlp")).weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"`model\.language_model\.layers\.1\.mlp\.down_proj` holds NaN or infinite"):
        sab_hf.quantize(model, processor, None, make_config())
    assert not packed_linears(model)
    assert not hasattr(model.config, "quantization_config")


def test_nan_weight_in_a_file_is_named(model, processor, make_config, tmp_path):
    model.get_submodule(DOWN_MODULE).weight.data[0, 0] = float("inf")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"`{re.escape(DOWN_MODULE)}` holds NaN or infinite.*damaged"):
        load(tmp_path, quantization_config=make_config())


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("model.language_model.layers.1.mlp.up_proj", r"layers\.1\.mlp\.down_proj"),
        ("model.multi_modal_projector.linear_2", r"layers\.0\.self_attn\.q_proj"),
    ],
)
def test_infinite_activations_are_named(model, processor, make_config, broken, named):
    model.get_submodule(broken).weight.data.mul_(1e38)
    with pytest.raises(ValueError, match=rf"inputs of `model\.language_model\.{named}` are not finite.*bfloat16"):
        sab_hf.quantize(model, processor, None, make_config())


# ---- damaged or wrongly labelled checkpoints


def test_dense_weights_under_a_sab_config_are_refused(vlm_dir, packed_dir, tmp_path):
    path = tmp_path / "dense"
    shutil.copytree(vlm_dir, path)
    shutil.copy(packed_dir / "config.json", path / "config.json")
    message = r"lacks packed tensors: \d+ in all, first `model\.language_model\..*download or quantize it again"
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert "quantization_config" not in str(error.value)  # advice to remove it would make the loss final


@pytest.mark.parametrize("older", ["dense", "packed"])
def test_an_older_file_beside_new_shards_is_named(vlm_dir, packed_dir, make_config, tmp_path, older):
    path = tmp_path / "both"
    shutil.copytree(vlm_dir if older == "dense" else packed_dir, path)
    load(vlm_dir, quantization_config=make_config(bits=3.0)).save_pretrained(path, max_shard_size="60KB")
    for read in (load, inspect):
        with pytest.raises(
            ValueError, match=r"model\.safetensors is left from an older save, .*remove model\.safetensors"
        ) as error:
            read(path)
        assert "quantization_config" not in str(error.value)
    (path / "model.safetensors").unlink()
    load(path)
    (path / "model.safetensors.index.json").touch()
    load(packed_dir).save_pretrained(path)  # one file again; what is left of the index does no harm
    load(path)


@pytest.mark.parametrize("suffix", ["signs", "col_scale", "significant_columns", "residual_row_scale"])
def test_missing_packed_tensor_is_named(damage, suffix):
    path = damage(tensors=lambda tensors: tensors.pop(f"{DOWN}.{suffix}"))
    with pytest.raises(
        ValueError, match=rf"lacks packed tensors: 1 in all, first `{re.escape(DOWN_MODULE)}\.{suffix}`"
    ):
        load(path)


def test_missing_bias_is_named(damage):
    """A SABLinear's bias has no initial value either: it would be uninitialised memory."""
    path = damage(tensors=lambda tensors: tensors.pop("language_model.model.layers.0.self_attn.q_proj.bias"))
    with pytest.raises(ValueError, match=r"`model\.language_model\.layers\.0\.self_attn\.q_proj\.bias`"):
        load(path)


@pytest.mark.parametrize("change", [{"modules": {}}, {"modules": None}])
def test_empty_module_list_is_refused(damage, change):
    def edit(config):
        del config["modules"]
        config |= {name: value for name, value in change.items() if value is not None}

    with pytest.raises(ValueError, match=r"lists no quantized modules.*download or quantize the checkpoint again"):
        load(damage(config=edit))


def test_listed_module_that_the_model_lacks_is_named(damage):
    path = damage(config=lambda config: config["modules"].update({"model.nowhere": [1, 0]}))
    with pytest.raises(ValueError, match=r"1 modules that are no Linear of Llava.*first `model\.nowhere`"):
        load(path)


def test_packed_module_that_the_config_does_not_list_is_named(damage):
    """Its dense weight would be random."""
    path = damage(config=lambda config: config["modules"].pop(DOWN_MODULE))
    with pytest.raises(ValueError, match="down_proj"):
        load(path)


def test_residual_plane_that_the_config_does_not_list_is_named(damage):
    """Without its residual plane the module would compute something else."""
    path = damage(config=lambda config: config["modules"].update({DOWN_MODULE: [1, 0]}))
    with pytest.raises(ValueError, match="down_proj"):
        load(path)


@pytest.mark.parametrize("suffix", ["signs", "row_scale", "residual_signs"])
def test_packed_tensor_of_a_wrong_shape_is_refused(damage, suffix):
    def shorten(tensors):
        tensors[f"{DOWN}.{suffix}"] = tensors[f"{DOWN}.{suffix}"][..., :-1].contiguous()

    with pytest.raises((RuntimeError, ValueError), match=r"mismatch|must be"):
        load(damage(tensors=shorten))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scale_of_a_wrong_dtype_is_named(damage, dtype):
    """Version 1 stores scales as the bits of float16 in int16; another writer may forget that."""

    def store_as_float(tensors):
        tensors[f"{DOWN}.row_scale"] = tensors[f"{DOWN}.row_scale"].view(torch.float16).to(dtype)

    with pytest.raises(ValueError, match=r"down_proj\.row_scale.*(int16|I16)"):
        load(damage(tensors=store_as_float))


def test_mask_that_marks_another_number_of_columns_is_refused(damage):
    path = damage(tensors=lambda tensors: tensors[f"{DOWN}.significant_columns"].zero_())
    with pytest.raises(ValueError, match=r"`significant_columns` must mark \d+ columns, .* got 0"):
        load(path)


@pytest.mark.parametrize("keep", [0.02, 0.5])  # in the header, in the tensors
def test_truncated_file_is_refused(packed_dir, tmp_path, keep):
    path = tmp_path / "truncated"
    shutil.copytree(packed_dir, path)
    file = path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    with pytest.raises((SafetensorError, OSError, ValueError)):
        load(path)


def test_future_format_version_asks_for_an_upgrade(damage):
    path = damage(config=lambda config: config.update(format_version=2, new_field=3))
    with pytest.raises(ValueError, match=r"format version 2, this sab_hf reads version 1; upgrade sab_hf, from where"):
        load(path)


# ---- quantized already


def test_quantizing_a_packed_model_is_refused(packed_dir, processor, make_config):
    model = load(packed_dir)
    with pytest.raises(ValueError, match=r"quantized already.*q_proj.*model\.dequantize\(\)"):
        sab_hf.quantize(model, processor, None, make_config())


def test_model_of_another_method_is_refused(model, processor, make_config):
    model.is_quantized, model.quantization_method = True, "awq"  # as transformers marks it
    with pytest.raises(ValueError, match=r"quantized already \(awq\); start from the dense checkpoint"):
        sab_hf.quantize(model, processor, None, make_config())


def test_config_for_a_packed_checkpoint_is_ignored_with_a_warning(packed_dir, make_config, inputs):
    """transformers does so for every method; what counts is that the packed weights are used, and the user is told."""
    with pytest.warns(UserWarning, match="already has a `quantization_config` attribute.*from the model will be used"):
        model = load(packed_dir, quantization_config=make_config(bits=4.0))
    assert torch.equal(logits(model, inputs), logits(load(packed_dir), inputs))
    assert {linear.num_planes for linear in packed_linears(model).values()} == {1}
    assert model.config.quantization_config.bits is None


# ---- offloading and saving


@pytest.mark.skipif(V5, reason="version 5 writes nothing but safetensors")
def test_pickled_files_are_refused(packed_dir, tmp_path):
    model = load(packed_dir)
    with pytest.raises(ValueError, match="sab and is not serializable"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.glob("*.bin"))


def without_tensor(path: Path, folder: Path, name: str) -> Path:
    """Copy a dense checkpoint without one of its tensors."""
    shutil.copytree(path, folder)
    tensors = load_file(folder / "model.safetensors")
    lost = next(key for key in tensors if key.endswith(name))
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["layers.1.mlp.up_proj.weight", "norm.weight", "lm_head.weight"])
def test_dense_checkpoint_that_lacks_a_tensor_is_refused(vlm_dir, make_config, tmp_path, name):
    """Transformers would fill it with random values, and these would be binarized."""
    path = without_tensor(vlm_dir, tmp_path / "lost", name)
    with pytest.raises(
        ValueError, match=rf"lacks 1 of the \d+ tensors of Llava.*{name}`.*LlavaForConditionalGeneration"
    ):
        load(path, quantization_config=make_config())


def test_class_that_the_checkpoint_has_no_tensors_for_is_refused(vlm_dir, make_config, processor):
    config = make_config(calibration=["some text"] * 4, processor=processor.tokenizer, allow_text_only=True)
    with pytest.raises(ValueError, match=r"lacks \d+ of the \d+ tensors of LlamaForCausalLM: `lm_head.weight`, .*…"):
        LlamaForCausalLM.from_pretrained(vlm_dir, config=build_llama(vocab_size=270).config, quantization_config=config)


def test_sizes_that_do_not_match_are_refused(vlm_dir, make_config):
    """With `ignore_mismatched_sizes=True` transformers fills such tensors with random values, and these would be binarized."""
    changed = AutoConfig.from_pretrained(vlm_dir)
    changed.text_config.intermediate_size = 40
    with pytest.raises(
        ValueError, match=r"holds 6 tensors of another size than LlavaFor.*: `.*layers\.0\.mlp\.down_proj"
    ):
        load(vlm_dir, config=changed, quantization_config=make_config(), ignore_mismatched_sizes=True)
    model = load(vlm_dir, quantization_config=make_config(), ignore_mismatched_sizes=True)
    assert "initialize_weights" not in vars(model)


def test_tied_head_is_not_missing(make_config, tmp_path, processor):
    build_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    config = make_config(calibration=["some text"] * 4, processor=processor.tokenizer, allow_text_only=True)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "tie_weights" not in vars(model)


def test_tensor_that_the_class_allows_to_be_missing_is_not_missed(vlm_dir, make_config, tmp_path, monkeypatch):
    path = without_tensor(vlm_dir, tmp_path / "lost", "norm.weight")
    monkeypatch.setattr(LlavaForConditionalGeneration, "_keys_to_ignore_on_load_missing", [r"norm\.weight$"])
    assert load(path, quantization_config=make_config()).is_quantized
