"""What stands between the last block and the logits: its modules where they are all, else the model's own forward."""

import pytest
import torch
from family_zoo import FAMILIES, grids
from helpers import build_llama, logits
from transformers import Gemma2Config, Gemma2ForCausalLM

from sab_hf.anatomy.roles import find_roles
from sab_hf.calibration import TEXT, CalibrationBatch, token_modality
from sab_hf.passes.capture import BlockInputs
from sab_hf.passes.tail import Tail

IDS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))


def tail_of(model, batch, part=slice(3, 8)):
    """Return the tail, and the logits that it gives for some positions of the output of the full-precision blocks."""
    blocks = find_roles(model).stacks[-1]
    modules = [model.get_submodule(name) for name in blocks]
    inputs = BlockInputs(model, blocks, [batch])
    (state,) = inputs.states
    tail = Tail(model, modules, batch, state)
    for index, module in enumerate(modules):
        inputs.advance(module, index)
    with torch.no_grad():
        return tail, tail.logits(batch, state, state.hidden, part)


def text_batch(model):
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    return CalibrationBatch(inputs, token_modality(inputs, model.config))


def test_norm_and_head_are_all_of_a_llama():
    model = build_llama()
    batch = text_batch(model)
    tail, given = tail_of(model, batch)
    assert tail.chain == [model.model.norm, model.lm_head]
    assert tail.width == model.config.vocab_size
    torch.testing.assert_close(given, logits(model, batch.inputs)[:, 3:8], rtol=1e-4, atol=1e-5)


def test_logits_that_are_capped_after_the_head_come_from_the_model():
    config = Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    batch = text_batch(model)
    tail, given = tail_of(model, batch)
    assert not tail.chain
    assert tail.by_ids
    torch.testing.assert_close(given, logits(model, batch.inputs)[:, 3:8], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_pictures_do_not_matter_after_the_blocks(family):
    if family not in FAMILIES:
        pytest.skip("not in this version of transformers")
    made = FAMILIES[family]()
    batch = made.batches[0]
    batch = (
        batch
        if isinstance(batch, CalibrationBatch)
        else CalibrationBatch(batch, token_modality(batch, made.model.config))
    )
    tail, given = tail_of(made.model, batch)
    assert tail.chain
    torch.testing.assert_close(given, logits(made.model, batch.inputs)[:, 3:8], rtol=1e-4, atol=1e-4)


def test_features_of_images_that_are_added_after_the_last_block_come_from_the_model(monkeypatch):
    """Positions of images tell that, which begin after ten of text here."""
    monkeypatch.setitem(grids.QWEN3_VISION, "deepstack_visual_indexes", [0, 1])
    made = FAMILIES["qwen3_vl"]()
    batch = CalibrationBatch(made.batches[0], token_modality(made.batches[0], made.model.config))
    first = int((batch.modality[0] > TEXT).nonzero()[0])
    assert first >= 8
    part = slice(first - 1, first + 3)
    tail, given = tail_of(made.model, batch, part)
    assert not tail.chain
    torch.testing.assert_close(given, logits(made.model, batch.inputs)[:, part], rtol=1e-4, atol=1e-4)
