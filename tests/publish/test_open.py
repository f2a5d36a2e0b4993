"""Which class opens a checkpoint, also where the model's code is in the checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from helpers import build_llama, build_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlavaConfig

import sab_hf
from sab_hf.publish.open import opening_class

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
OWN = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(architectures=["LlamaModel"]), "LlamaModel"),
        (LlamaConfig(architectures=None), "AutoModelForCausalLM"),
        (LlamaConfig(architectures=["LlamaOfTheFuture"]), "AutoModelForCausalLM"),
        (LlavaConfig(architectures=None), "AutoModelForImageTextToText"),
        (LlamaConfig(architectures=["OwnForCausalLM"], auto_map=OWN), "AutoModelForCausalLM"),
        (LlamaConfig(architectures=["LlamaForCausalLM"], auto_map={"AutoModel": "x.Y"}), "LlamaForCausalLM"),
    ],
)
def test_class_that_opens_a_checkpoint(config, expected):
    assert opening_class(config) is getattr(transformers, expected)


@pytest.fixture
def own_dir(tmp_path, monkeypatch):
    """A dense checkpoint with a tokenizer and a model class of its own."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = tmp_path / "own"
    build_llama().save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    (path / "modeling_own.py").write_text(CODE)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": OWN}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_model_with_code_of_its_own_is_saved_and_loaded_with_it(own_dir, make_config, tmp_path):
    config = make_config(calibration=["some text", "more"] * 4, allow_text_only=True, processor=build_tokenizer())
    model = AutoModelForCausalLM.from_pretrained(own_dir, quantization_config=config, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    sab_hf.save(model, build_tokenizer(), tmp_path / "packed")
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "import AutoProcessor, AutoModelForCausalLM\n" in card
    assert card.count("trust_remote_code=True") == 2
    again, _ = sab_hf.load(tmp_path / "packed", trust_remote_code=True, dtype=torch.float32)
    assert type(again).__name__ == "OwnForCausalLM"
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)


def test_card_of_a_class_of_transformers_names_it(tmp_path, make_config):
    model = build_llama()
    config = make_config(calibration=["some text", "more"] * 4, allow_text_only=True)
    sab_hf.quantize(model, build_tokenizer(), None, config)
    sab_hf.save(model, build_tokenizer(), tmp_path / "packed")
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "import AutoProcessor, LlamaForCausalLM\n" in card
    assert "trust_remote_code" not in card
    assert type(sab_hf.load(tmp_path / "packed")[0]) is LlamaForCausalLM
