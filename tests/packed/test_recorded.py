"""Recorded decoding: tokens of `generate` on a CPU are those of the model's own passes, whoever uses the model how."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from family_zoo import FAMILIES
from helpers import build_llama, load, random_planes
from torch import Tensor, nn

import sab_hf
from sab_hf.anatomy.roles import find_roles
from sab_hf.kernels.cpu import library
from sab_hf.packed import recorded
from sab_hf.packed.linear import SABLinear, replace_module

pytestmark = pytest.mark.skipif(library.load() is None, reason="there is no compiled library")
LENGTH = 12


def pack(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Give the Linears of the language blocks random planes."""
    model = model.to(dtype).eval()
    blocks = list(find_roles(model).blocks)
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and any(name.startswith(f"{block}.") for block in blocks):
            planes = random_planes(linear.out_features, linear.in_features, 1, linear.in_features // 8)
            replace_module(model, name, SABLinear.from_planes(planes, linear.bias, dtype))
    return model


def answer(model: nn.Module, inputs: dict[str, Tensor], **how) -> tuple[Tensor, Tensor]:
    """Return tokens and logits of a greedy answer."""
    out = model.generate(
        **inputs, max_new_tokens=LENGTH, min_new_tokens=LENGTH, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **how,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


def assert_as_before(
    model: nn.Module, inputs: dict[str, Tensor], tolerance: float = 1e-4, **how
) -> recorded.RecordedDecoding:
    """Check that recorded tokens and logits are the model's own, and that there are recorded ones."""
    tokens, logits = answer(model, inputs, **how)
    assert sab_hf.record_decoding(model)
    found, close = answer(model, inputs, **how)
    assert torch.equal(found, tokens)
    assert (close.float() - logits.float()).norm() <= tolerance * logits.float().norm()
    assert not model.forward.refused
    assert model.forward.replayed == LENGTH - 3  # the prompt's pass gives one, two passes are recorded
    return model.forward


def inputs_of(family) -> dict[str, Tensor]:
    return {name: value for name, value in family.batches[-1].items() if name not in ("labels", "modality")}


@pytest.fixture
def llama() -> nn.Module:
    return pack(build_llama())


@pytest.fixture
def ids() -> dict[str, Tensor]:
    tokens = torch.arange(3, 12)[None]
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "mistral", "smolvlm"])
def test_tokens_of_a_family_are_its_own(name):
    family = FAMILIES[name]()
    assert_as_before(pack(family.model), inputs_of(family))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_half_precision(dtype, tolerance, ids):
    assert_as_before(pack(build_llama(), dtype), ids, tolerance)


def test_batches_with_padding(llama, ids):
    tokens = ids["input_ids"].repeat(3, 1)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    assert_as_before(llama, {"input_ids": tokens, "attention_mask": mask})


def test_beams(llama, ids):
    """Beams reorder the cache after each token: its tensors are others each time."""
    plain = llama.generate(**ids, num_beams=3, max_new_tokens=LENGTH, do_sample=False)
    sab_hf.record_decoding(llama)
    for _ in range(2):
        assert torch.equal(llama.generate(**ids, num_beams=3, max_new_tokens=LENGTH, do_sample=False), plain)
    assert llama.forward.replayed > 0


def test_second_answer_needs_no_recording_and_another_length_neither(llama, ids):
    recording = assert_as_before(llama, ids)
    longer = {name: value.repeat(1, 40) for name, value in ids.items()}
    count = recording.replayed
    tokens, _ = answer(llama, longer)
    assert recording.replayed == count + LENGTH - 1
    sab_hf.record_decoding(llama, enabled=False)
    assert torch.equal(answer(llama, longer)[0], tokens)


def test_caches_do_not_disturb_each_other(llama, ids):
    """Two conversations take turns, and one of them is cut back to try again."""

    def say(cache, token: int) -> Tensor:
        with torch.no_grad():
            return llama(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits

    def talk() -> list[Tensor]:
        caches, found = [], []
        for shift in (0, 1):
            with torch.no_grad():
                caches.append(llama(input_ids=ids["input_ids"] + shift, use_cache=True).past_key_values)
        for token in range(5, 12):
            found += [say(cache, token + place) for place, cache in enumerate(caches)]
        kept = caches[0].layers[0].keys
        was = kept.clone()
        caches[0].crop(-3)
        found += [say(caches[0], 20), say(caches[1], 21), say(copy.deepcopy(caches[0]), 22), say(caches[0], 23)]
        assert torch.equal(kept, was)  # what somebody took from the cache stays as it was
        return found

    expected = talk()
    sab_hf.record_decoding(llama)
    for _ in range(2):
        for found, wanted in zip(talk(), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert llama.forward.replayed > 10


def test_room_grows(llama, ids, monkeypatch):
    monkeypatch.setattr(recorded, "_ROOM", 4)
    assert_as_before(llama, ids)


@torch.no_grad()
def change_norm(model):
    model.model.norm.weight.mul_(-0.5)  # read where it is


@torch.no_grad()
def change_signs(model):
    model.model.layers[0].mlp.up_proj.signs.bitwise_not_()  # laid out anew


def change_parameter(model):
    model.model.layers[1].input_layernorm.weight = nn.Parameter(torch.rand(model.config.hidden_size))


def change_module(model):
    model.model.layers[1].mlp.act_fn = nn.ReLU()


def change_hook(model):
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: -output)


def change_setting(model):
    model.model.norm.variance_epsilon = 3.0


@pytest.mark.parametrize(
    "change", [change_norm, change_signs, change_parameter, change_module, change_hook, change_setting]
)
def test_a_changed_model_gives_what_it_now_gives(llama, ids, change):
    was = answer(llama, ids)[1]
    assert_as_before(llama, ids)
    count = llama.forward.replayed
    change(llama)
    found, close = answer(llama, ids)
    assert llama.forward.replayed > count
    sab_hf.record_decoding(llama, enabled=False)
    tokens, logits = answer(llama, ids)
    assert torch.equal(found, tokens)
    torch.testing.assert_close(close, logits, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits, was)


def test_copies_and_pickles_are_models_of_their_own(llama, ids):
    expected, _ = answer(llama, ids)
    assert_as_before(llama, ids)
    for twin in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        assert twin.forward.__wrapped__.__self__ is twin
        assert twin.forward.replayed == 0
        assert torch.equal(answer(twin, ids)[0], expected)
        assert twin.forward.replayed == LENGTH - 3
        twin.model.norm.weight.data.zero_()
    assert torch.equal(answer(llama, ids)[0], expected)


def test_gradients_hidden_states_and_prompts_are_the_models_own(llama, ids):
    assert_as_before(llama, ids)
    count = llama.forward.replayed
    with torch.no_grad():
        cache = llama(**ids, use_cache=True).past_key_values
    one = torch.tensor([[4]])
    assert llama(input_ids=one, past_key_values=cache, use_cache=True).logits.requires_grad
    with torch.no_grad():
        out = llama(input_ids=one, past_key_values=cache, use_cache=True, output_hidden_states=True)
    assert len(out.hidden_states) == llama.config.num_hidden_layers + 1
    assert llama.forward.replayed == count


def test_a_model_that_decides_by_values_keeps_its_own_way(llama, ids):
    """One whose passes differ by more than the tokens is refused, and what it says stays right."""
    layer = llama.model.layers[0]
    original = type(layer).forward

    def forward(self, hidden_states, *args, **kwargs):
        if float(hidden_states.sum()) != 0:  # a number that is another one each time
            hidden_states = hidden_states * 1.0
        return original(self, hidden_states, *args, **kwargs)

    layer.forward = forward.__get__(layer)
    expected, _ = answer(llama, ids)
    sab_hf.record_decoding(llama)
    assert torch.equal(answer(llama, ids)[0], expected)
    assert llama.forward.replayed == 0
    assert "depends on a number" in next(iter(llama.forward.refused.values())) or "became" in str(llama.forward.refused)


def test_steps_that_give_something_else_are_not_used(llama, ids, monkeypatch):
    expected, _ = answer(llama, ids)
    run = recorded._Replay.run

    def wrong(self, cache, room, inputs, tokens):
        output = run(self, cache, room, inputs, tokens)
        output["logits"] = output["logits"] + 1
        return output

    monkeypatch.setattr(recorded._Replay, "run", wrong)
    sab_hf.record_decoding(llama)
    assert torch.equal(answer(llama, ids)[0], expected)
    assert "another result" in next(iter(llama.forward.refused.values()))


def test_undone_and_never_without_packed_modules(ids):
    dense = build_llama().eval()
    assert not sab_hf.record_decoding(dense)
    assert "forward" not in vars(dense)
    model = pack(build_llama())
    assert sab_hf.record_decoding(model)
    assert sab_hf.record_decoding(model)
    assert not sab_hf.record_decoding(model, enabled=False)
    assert "forward" not in vars(model)


def test_loaded_models_do_it_unless_told_otherwise(packed_dir, monkeypatch):
    assert isinstance(load(packed_dir).forward, recorded.RecordedDecoding)
    monkeypatch.setenv(recorded.SWITCH, "0")
    assert "forward" not in vars(load(packed_dir))


def test_compiled_models_take_no_notice(llama, ids):
    sab_hf.record_decoding(llama)
    with torch.no_grad():
        expected = llama(**ids).logits
        explained = torch._dynamo.explain(llama)(**ids, use_cache=False)
    assert explained.graph_break_count == 0
    torch.testing.assert_close(torch.compile(llama, backend="eager")(**ids, use_cache=False).logits, expected)
