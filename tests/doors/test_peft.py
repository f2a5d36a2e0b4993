"""LoRA on packed models: gradients, training, saving, loading on a packed base, refusing to merge."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import build_llama, build_processor, build_tokenizer, load, logits, packed_linears
from torch import nn
from transformers import LlamaForCausalLM

import sab_hf
from sab_hf import SABLinear
from sab_hf.kernels.ops import sab_linear

peft = pytest.importorskip("peft")
sab_peft = pytest.importorskip("sab_hf.peft")


def labelled(samples) -> dict[str, torch.Tensor]:
    """One padded training batch; every token but padding is a label."""
    processor = build_processor()
    texts = processor.apply_chat_template(samples, tokenize=False)
    images = [[sample[0]["content"][0]["image"]] for sample in samples]
    batch = dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


@pytest.fixture
def packed(packed_dir):
    return load(packed_dir)


def lora(model, **changes):
    torch.manual_seed(0)
    return peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": "all-linear"} | changes)
    )


def train(model, batch, steps=4) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# ---- the gradient


@pytest.mark.parametrize("bits", [None, 1.7, 3.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_inputs_is_that_of_the_dense_matrix(vlm_dir, make_config, bits, dtype):
    model = load(vlm_dir, quantization_config=make_config(bits=bits))
    for module in list(packed_linears(model).values())[:7]:
        x = torch.randn(2, 3, module.in_features).to(dtype).requires_grad_()
        y = module(x)
        grad = torch.randn_like(y)
        y.backward(grad)
        reference = grad.float() @ module.planes().dense()
        assert x.grad.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(x.grad.float(), reference, rtol=tolerance, atol=tolerance * reference.abs().max())
        assert all(p.grad is None for p in module.parameters())


def test_op_passes_opcheck_with_gradient(packed):
    module = next(m for m in packed_linears(packed).values() if m.num_significant)
    planes = module.packed_tensors()
    scales = {name: planes[name].view(torch.float16) for name in planes if name.endswith("scale")}
    x = torch.randn(3, module.in_features, requires_grad=True)
    arguments = (
        x, planes["signs"], scales["row_scale"], scales["col_scale"], planes["significant_columns"],
        planes["residual_signs"], scales["residual_row_scale"], scales["residual_col_scale"],
    )  # fmt: skip
    torch.library.opcheck(sab_linear, arguments)


# ---- PEFT


def test_every_packed_linear_gets_an_adapter_that_changes_nothing_at_first(packed, inputs):
    before, names = logits(packed, inputs), packed_linears(packed).keys()
    model = lora(packed)
    layers = {name for name, m in model.get_base_model().named_modules() if isinstance(m, sab_peft.LoraSABLinear)}
    assert layers == names
    assert "lm_head" not in model.peft_config["default"].target_modules
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)
    assert torch.equal(logits(model, inputs), before)


def test_modules_can_be_chosen_by_name(packed):
    model = lora(packed, target_modules=["q_proj", "v_proj"], exclude_modules=".*vision.*", lora_dropout=0.1)
    layers = [name for name, m in model.named_modules() if isinstance(m, sab_peft.LoraSABLinear)]
    assert len(layers) == 4
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_lowers_the_loss_and_leaves_the_planes(packed, samples, checkpointing):
    planes = copy.deepcopy({k: v for k, v in packed.state_dict().items() if not k.startswith("lora")})
    batch, model = labelled(samples), lora(packed)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    losses = train(model, batch)
    assert losses[-1] < losses[0] - 0.1
    after = {k.replace(".base_layer", ""): v for k, v in model.get_base_model().state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in planes.items())


def test_gradient_checkpointing_gives_the_same_gradients(packed, samples):
    batch, model = labelled(samples), lora(packed)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model(**batch).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None])
        model.zero_grad()
    assert grads[0]
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_saved_adapter_loads_on_a_packed_base_and_merges_into_a_dense_one(
    packed, packed_dir, samples, inputs, tmp_path
):
    model = lora(packed)
    train(model.train(), labelled(samples))
    model.eval().save_pretrained(tmp_path)
    expected = logits(model, inputs)
    assert {file.name for file in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }

    loaded = peft.PeftModel.from_pretrained(load(packed_dir), tmp_path)
    assert any(isinstance(m, SABLinear) for m in loaded.modules())
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=1e-5, atol=1e-5)
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded, inputs), logits(load(packed_dir), inputs), rtol=1e-5, atol=1e-5)
    for merge in (loaded.merge_adapter, loaded.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged into packed sign planes"):
            merge()

    by_transformers = load(packed_dir)
    by_transformers.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(by_transformers, inputs), expected, rtol=1e-5, atol=1e-5)

    dense = peft.PeftModel.from_pretrained(load(packed_dir).dequantize(), tmp_path).merge_and_unload()
    assert not any(isinstance(m, SABLinear) for m in dense.modules())
    torch.testing.assert_close(logits(dense, inputs), expected, rtol=1e-3, atol=1e-3)


def test_two_adapters_in_one_batch(packed, samples, inputs):
    model = lora(packed)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    for name in ("default", "other"):
        model.set_adapter(name)
        train(model.train(), labelled(samples), steps=1)
    model.eval()
    alone = {"__base__": None, "default": None, "other": None}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = logits(model, inputs)
    with model.disable_adapter():
        alone["__base__"] = logits(model, inputs)
    batch = {key: torch.cat([tensor] * 3) for key, tensor in inputs.items()}
    with torch.no_grad():
        mixed = model(**batch, adapter_names=list(alone)).logits
    torch.testing.assert_close(mixed, torch.cat(list(alone.values())), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_variants_that_need_the_dense_weight_are_refused(packed, changes):
    with pytest.raises(ValueError, match="needs the dense weight; leave it out"):
        lora(packed, target_modules=r".*language_model.*q_proj", **changes)


def test_other_modules_get_pefts_own_layers():
    model = peft.get_peft_model(nn.Sequential(nn.Linear(3, 4)), peft.LoraConfig(r=2, target_modules=["0"]))
    layer = model.get_base_model()[0]
    assert type(layer).__module__ == "peft.tuners.lora.layer"


# ---- Trainer


def test_trainer_trains_an_adapter_and_refuses_the_bare_packed_model(packed, samples, tmp_path):
    from transformers import Trainer, TrainingArguments

    batch = labelled(samples)
    rows = [{name: tensor[i] for name, tensor in batch.items()} for i in range(len(samples))]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=3, learning_rate=2e-2, report_to=[], save_steps=3,
        gradient_checkpointing=True, use_cpu=True, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(packed, arguments, train_dataset=rows)
    model = lora(packed)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").is_file()


# ---- what is refused, and how to go on


@pytest.fixture(scope="module")
def packed_rest_dir(tmp_path_factory, make_config):
    """A Llama with packed embedding and head, both untied."""
    path = tmp_path_factory.mktemp("rest")
    model = build_llama()
    config = make_config(calibration=["some text", "more"] * 4, allow_text_only=True, rest_bits=4)
    sab_hf.quantize(model, build_tokenizer(), None, config)
    model.save_pretrained(path)
    return path


def test_quantizing_a_model_with_an_adapter_is_refused_before_calibration(model, make_config):
    wrapped = lora(model, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"this is a PeftModel; .*merge_and_unload\(\)`.*unload\(\)`"):
        sab_hf.quantize(wrapped, config=make_config(calibration="no/such/dataset"))
    with pytest.raises(ValueError, match=r"has one in `model\..*q_proj`"):
        sab_hf.quantize(wrapped.get_base_model(), config=make_config(calibration="no/such/dataset"))


def test_saving_a_model_with_an_adapter_says_how_to_save_both(packed, inputs, tmp_path):
    model = lora(packed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    expected = logits(model.eval(), inputs)
    with pytest.raises(
        ValueError, match=r"save the adapter with `model\.save_pretrained.*sab_hf\.save\(model\.unload\(\)"
    ):
        sab_hf.save(model, build_processor(), tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    with pytest.raises(ValueError, match=r"changed after it was quantized.*unload"):
        model.get_base_model().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    sab_hf.save(model.unload(), build_processor(), tmp_path / "packed")
    again = peft.PeftModel.from_pretrained(load(tmp_path / "packed"), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again, inputs), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"modules_to_save": ["embed_tokens"]},
            r"`modules_to_save` asks to train `model\.embed_tokens`, which is packed",
        ),
        ({"modules_to_save": ["lm_head"]}, r"`modules_to_save` asks to train `lm_head`, which is packed"),
        ({"modules_to_save": ["mlp"]}, r"`modules_to_save` asks to train `model\.layers\.0\.mlp`, which is packed"),
        ({"trainable_token_indices": [1]}, r"`trainable_token_indices` asks to train `model\.embed_tokens`"),
        (
            {"trainable_token_indices": {"embed_tokens": [1]}},
            r"`trainable_token_indices` asks to train `model\.embed_tok",
        ),
        (
            {"target_modules": ["embed_tokens"]},
            r"LORA adapters need the dense weight of `.*embed_tokens`.*SABEmbedding",
        ),
    ],
)
def test_training_packed_parts_themselves_is_refused(packed_rest_dir, changes, message):
    model = LlamaForCausalLM.from_pretrained(packed_rest_dir)
    with pytest.raises(ValueError, match=f"{message}.*dequantize"):
        lora(model, **{"target_modules": ["q_proj"]} | changes)


def test_lora_on_a_packed_head_trains(packed_rest_dir):
    model, ids = (
        lora(LlamaForCausalLM.from_pretrained(packed_rest_dir), target_modules=["lm_head"]),
        torch.arange(9)[None],
    )
    losses = train(model, {"input_ids": ids, "labels": ids}, steps=8)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["IA3Config", "LoHaConfig", "LoKrConfig", "OFTConfig", "BOFTConfig", "VeraConfig"])
def test_adapters_that_need_the_dense_weight_are_refused(packed_rest_dir, kind):
    model = LlamaForCausalLM.from_pretrained(packed_rest_dir)
    extra = {"feedforward_modules": []} if kind == "IA3Config" else {}
    with pytest.raises(
        ValueError, match=r"adapters need the dense weight of `.*q_proj`, which is packed \(SABLinear\); use LoRA"
    ):
        peft.get_peft_model(model, getattr(peft, kind)(target_modules=["q_proj"], **extra))


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_prompts_need_a_dense_embedding(packed_rest_dir, packed, kind):
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(
        ValueError, match=r"needs a dense embedding, and that of the model is packed.*`embedding_bits=16`"
    ):
        peft.get_peft_model(LlamaForCausalLM.from_pretrained(packed_rest_dir), config)
    model, ids = peft.get_peft_model(packed, config), torch.arange(9)[None]
    losses = train(model, {"input_ids": ids, "labels": ids}, steps=8)
    assert losses[-1] < losses[0]


def test_prefix_is_trained_beside_a_packed_embedding(packed_rest_dir):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(packed_rest_dir), config)
    ids = torch.arange(9)[None]
    losses = train(model, {"input_ids": ids, "labels": ids}, steps=8)
    assert losses[-1] < losses[0]


def test_adapters_on_dense_parts_of_a_packed_model_work(packed_rest_dir):
    model, ids = LlamaForCausalLM.from_pretrained(packed_rest_dir), torch.arange(9)[None]
    tuned = peft.get_peft_model(model, peft.LNTuningConfig(target_modules=["norm"]))
    assert tuned(ids).logits.isfinite().all()
