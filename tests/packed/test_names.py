"""Packed tensors are found again under whatever names transformers gives them, by whatever class opens the checkpoint."""

from __future__ import annotations

import pickle

import pytest
import torch
from helpers import V5, build_llama, build_llava, build_tokenizer, load, logits, packed_linears
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

import sab_hf
from sab_hf import SABQuantizationConfig
from sab_hf.packed.linear import SABModule
from sab_hf.packed.names import tied
from sab_hf.publish.inspect import inspect

FAST = {
    "calibration": ["some text", "more"] * 4,
    "num_samples": 4,
    "alternations": 1,
    "refine_steps": 0,
    "distil_steps": 0,
}
FAST |= {"sensitivity_samples": 2, "allow_text_only": True}


def packed_llama(path, **changes) -> LlamaForCausalLM:
    """Save a packed Llama and return it."""
    model = build_llama(num_key_value_heads=2)
    sab_hf.quantize(model, build_tokenizer(), None, SABQuantizationConfig(**FAST | changes))
    model.save_pretrained(path)
    return model


@pytest.fixture
def conversions():
    """Return a function that sets what transformers converts when it loads a Llama; undone afterwards."""
    from transformers import conversion_mapping

    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # fills the cache
    known = dict(conversion_mapping._checkpoint_conversion_mapping_cache)

    def use(*entries) -> None:
        conversion_mapping.register_checkpoint_conversion_mapping("llama", list(entries), overwrite=True)

    yield use
    conversion_mapping._checkpoint_conversion_mapping_cache = known


def check_round_trip(path, **changes) -> set[str]:
    """Check that a packed Llama, saved as it is and once more after loading, is the same; return the names in the file."""
    from safetensors import safe_open

    model, ids = packed_llama(path / "first", **changes), torch.arange(9)[None]
    again = LlamaForCausalLM.from_pretrained(path / "first")
    again.save_pretrained(path / "second")
    with torch.no_grad():
        for folder in ("first", "second"):
            found = LlamaForCausalLM.from_pretrained(path / folder)
            assert packed_linears(found).keys() == packed_linears(model).keys()
            torch.testing.assert_close(found(ids).logits, model(ids).logits)
            assert inspect(path / folder, verify=True).checksums == "verified"
    with safe_open(path / "second" / "model.safetensors", "pt") as reader:
        return set(reader.keys())


@pytest.mark.skipif(not V5, reason="transformers 5 converts weights")
def test_names_that_change_inside_blocks_are_found_again(tmp_path, conversions):
    from transformers.core_model_loading import WeightRenaming

    conversions(WeightRenaming(r"\.mlp\.w3\.", ".mlp.up_proj."), WeightRenaming(r"^layers\.", "model.layers."))
    names = check_round_trip(tmp_path)
    assert {"layers.1.mlp.w3.signs", "layers.1.mlp.gate_proj.signs"} <= names


@pytest.mark.skipif(not V5, reason="transformers 5 converts weights")
def test_converters_of_dense_weights_leave_packed_tensors_alone(tmp_path, conversions):
    from transformers.core_model_loading import Chunk, WeightConverter

    parts = [f".self_attn.{part}_proj" for part in "qkv"]
    conversions(WeightConverter([".self_attn.qkv"], parts, [Chunk(0)]))
    names = check_round_trip(tmp_path)
    assert {f"model.layers.0.self_attn.{part}_proj.signs" for part in "qkv"} <= names


@pytest.mark.skipif(not V5, reason="transformers 5 converts weights")
def test_dense_rest_of_a_converted_group_keeps_its_name(tmp_path, conversions):
    """Joined alone, `v_proj` would be taken for all three when it is loaded."""
    from transformers.core_model_loading import Chunk, WeightConverter

    parts = [f".self_attn.{part}_proj.weight" for part in "qkv"]
    conversions(WeightConverter([".self_attn.qkv.weight"], parts, [Chunk(0)]))
    names = check_round_trip(tmp_path, modules_to_not_convert=["v_proj"], allow_low_coverage=True)
    assert "model.layers.0.self_attn.v_proj.weight" in names


@pytest.mark.skipif(not V5, reason="transformers 5 converts weights")
def test_renaming_that_loading_does_not_undo_is_left_out(tmp_path, conversions):
    from transformers.core_model_loading import WeightRenaming

    conversions(WeightRenaming(r"\.ffn\.", ".feed."), WeightRenaming(r"\.ffn\.up_proj\.", ".mlp.up_proj."))
    names = check_round_trip(tmp_path)
    assert {"model.layers.0.mlp.up_proj.signs", "model.layers.0.mlp.gate_proj.signs"} <= names


@pytest.mark.skipif(not V5, reason="transformers 5 converts weights")
def test_model_whose_names_fall_together_in_files_is_not_saved(tmp_path, conversions):
    from transformers.core_model_loading import WeightRenaming

    conversions(WeightRenaming(r"\.mlp\.gate_proj\.", ".mlp.up_proj."))
    with pytest.raises(ValueError, match=r"cannot be saved so that.*first `model\.layers\.0\.mlp\.gate_proj"):
        packed_llama(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.skipif(not V5, reason="transformers 5 converts weights")
def test_packed_model_can_be_pickled_after_it_was_saved(tmp_path, conversions):
    from transformers.core_model_loading import Chunk, WeightConverter

    conversions(
        WeightConverter([".self_attn.qk.weight"], [f".self_attn.{part}_proj.weight" for part in "qk"], [Chunk(0)])
    )
    model = packed_llama(tmp_path)
    assert packed_linears(pickle.loads(pickle.dumps(model))).keys() == packed_linears(model).keys()


def test_model_that_could_not_be_loaded_again_is_not_saved(tmp_path, packed_dir):
    model = load(packed_dir)
    attention = model.model.language_model.layers[0].self_attn
    attention.q_proj = nn.Sequential(attention.q_proj)
    with pytest.raises(ValueError, match=r"14 packed modules.*only: `.*layers\.0\.self_attn\.q_proj`.*unload"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def count_packed(model: nn.Module) -> int:
    return sum(isinstance(module, SABModule) for module in model.modules())


def test_automodel_opens_the_same_modules_packed(packed_dir, inputs, tmp_path):
    whole, part = load(packed_dir), AutoModel.from_pretrained(packed_dir, dtype=torch.float32).eval()
    assert count_packed(part) == count_packed(whole)
    with torch.no_grad():
        hidden = part(**inputs).last_hidden_state
    torch.testing.assert_close(whole.lm_head(hidden), logits(whole, inputs))
    part.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).last_hidden_state, hidden)


@pytest.mark.parametrize("tied", [False, True])
def test_automodel_leaves_out_a_packed_head(tmp_path, tied):
    model = build_llama(tie_word_embeddings=tied)
    sab_hf.quantize(model, build_tokenizer(), None, SABQuantizationConfig(**FAST, rest_bits=4))
    model.save_pretrained(tmp_path)
    part, ids = AutoModel.from_pretrained(tmp_path), torch.arange(9)[None]
    assert count_packed(part) == count_packed(model) - (not tied)
    with torch.no_grad():
        torch.testing.assert_close(model.lm_head(part(ids).last_hidden_state), model(ids).logits)


@pytest.mark.skipif(not V5, reason="Qwen3.5 is in transformers 5")
@pytest.mark.parametrize("rest_bits", [16, 4])
def test_text_class_opens_the_language_part_of_a_vision_language_checkpoint(tmp_path, rest_bits):
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = {
        "vocab_size": 270,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text |= {"num_key_value_heads": 1, "head_dim": 16, "linear_num_key_heads": 1, "linear_num_value_heads": 2}
    text |= {
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    }
    vision = {"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(0)
    model = Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config=text, vision_config=vision | {"num_position_embeddings": 16}, image_token_id=262)
    ).eval()
    sab_hf.quantize(model, build_tokenizer(), None, SABQuantizationConfig(**FAST, rest_bits=rest_bits))
    model.save_pretrained(tmp_path)
    part, ids = AutoModelForCausalLM.from_pretrained(tmp_path), torch.arange(9)[None]
    expected = {name.replace("model.language_model", "model") for name in packed_linears(model) if "visual" not in name}
    assert packed_linears(part).keys() == expected
    with torch.no_grad():
        torch.testing.assert_close(part(ids).logits, model(ids).logits)


def test_class_without_the_packed_modules_is_named(packed_dir):
    from helpers import text_config

    with pytest.raises(
        ValueError, match=r"14 modules that are no Linear of LlamaForCausalLM.*with the class that saved it"
    ):
        LlamaForCausalLM.from_pretrained(packed_dir, config=_with_quantization(text_config(), packed_dir))


def _with_quantization(config, path):
    from transformers import AutoConfig

    config.quantization_config = AutoConfig.from_pretrained(path).quantization_config
    return config


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_tensors_are_found_by_what_they_share(device):
    model = build_llava(tied=True, tie_word_embeddings=True).to(device)
    model.tie_weights()
    found = tied(model.state_dict(keep_vars=True))
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in [*found, *found.values()]} == {
        "embed_tokens",
        "lm_head",
    }
    assert tied(build_llava().to(device).state_dict(keep_vars=True)) == {}
    whole = torch.zeros(4, 4)
    state = {"b": whole, "a": whole.view(4, 4), "part": whole[:2], "other": torch.zeros(4, 4), "empty": torch.empty(0)}
    assert tied(state | {"nothing": torch.empty(0)}) == {"a": "b"}
