"""Cached hidden states are what the model feeds its blocks, from few forward passes, and moments are those of the tokens."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from helpers import IMAGE, V5, VOCAB_SIZE, build_llama, build_llava
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

import sab_hf
from sab_hf import SABLinear
from sab_hf.anatomy.roles import find_roles
from sab_hf.anatomy.selection import language_linears
from sab_hf.calibration import PADDING, CalibrationBatch
from sab_hf.calibration.modality import token_modality
from sab_hf.machine.workspace import Workspace
from sab_hf.make.plan import make_plan
from sab_hf.packed.linear import replace_module
from sab_hf.passes.capture import BlockInputs, unpacked
from sab_hf.planes import SignPlanes


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def text_batches(model: nn.Module, lengths=(11, 7)) -> list[CalibrationBatch]:
    inputs = [{"input_ids": ids(2, length, length)} for length in lengths]
    return [CalibrationBatch(i, token_modality(i, model.config)) for i in inputs]


def padded_batch(model: nn.Module) -> CalibrationBatch:
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, 8:] = 0
    inputs = {"input_ids": ids(2, 13), "attention_mask": mask}
    return CalibrationBatch(inputs, token_modality(inputs, model.config))


def image_batches(model, make_config, processor, **changes) -> list[CalibrationBatch]:
    return make_plan(model, make_config(**changes), processor).calibration.batches


def gemma() -> Gemma3ForCausalLM:
    """Return a Gemma 3 whose blocks differ in attention mask and rotary positions."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=VOCAB_SIZE,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        pad_token_id=0,
        initializer_range=0.2,
    )
    return Gemma3ForCausalLM(config).eval()


def qwen() -> Qwen3VLForConditionalGeneration:
    """Return a Qwen3-VL, which adds deep visual features to the hidden states after its first two blocks."""
    torch.manual_seed(0)
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "vocab_size": VOCAB_SIZE,
            "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]},
            "initializer_range": 0.2,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.2,
        },
        image_token_id=IMAGE,
        vision_start_token_id=259,
        vision_end_token_id=260,
        video_token_id=261,
    )
    return Qwen3VLForConditionalGeneration(config).eval()


def qwen_batches(model: nn.Module) -> list[CalibrationBatch]:
    """Make two batches by hand, each an image of 4 × 4 patches (4 merged tokens) between words."""
    batches = []
    for seed in (0, 1):
        input_ids = ids(1, 12, seed)
        input_ids[0, 2], input_ids[0, 3:7], input_ids[0, 7] = 259, IMAGE, 260
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "mm_token_type_ids": (input_ids == IMAGE).int(),
            "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(seed)),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        }
        if not V5:
            del inputs["mm_token_type_ids"]  # only version 5 takes them
        batches.append(CalibrationBatch(inputs, token_modality(inputs, model.config)))
    return batches


CASES = {
    "llava": lambda request: (
        model := build_llava(),
        image_batches(model, request.getfixturevalue("make_config"), request.getfixturevalue("processor")),
    ),
    "llava, padded": lambda request: (
        model := build_llava(),
        image_batches(
            model, request.getfixturevalue("make_config"), request.getfixturevalue("processor"), batch_size=3
        ),
    ),
    "llama": lambda request: (model := build_llama(), text_batches(model)),
    "llama, padded": lambda request: (model := build_llama(), [padded_batch(model)]),
    "gemma3": lambda request: (model := gemma(), text_batches(model)),
    "qwen3_vl": lambda request: (model := qwen(), qwen_batches(model)),
}


@pytest.mark.parametrize("case", CASES)
def test_cached_hidden_states_are_what_the_model_feeds_its_blocks(case, request):
    """At every block of a model whose earlier blocks are binarized, against a hook on the real forward pass."""
    model, batches = CASES[case](request)
    roles = find_roles(model)
    linears = language_linears(model, roles, [])
    inputs = BlockInputs(model, roles.blocks, batches)
    for index, block_name in enumerate(roles.blocks):
        block = model.get_submodule(block_name)
        for state, batch in zip(inputs.states, batches, strict=True):
            fed = hidden_states_fed(model, block, batch)
            real = batch.modality != PADDING
            torch.testing.assert_close(state.hidden[real], fed[real], rtol=1e-4, atol=1e-5)
        for name, linear in linears.items():
            if name.startswith(f"{block_name}."):
                replace_module(model, name, one_plane(linear))
        inputs.advance(block, index)


def one_plane(linear: nn.Linear) -> SABLinear:
    """Return a rough binarization, far from the dense Linear."""
    W = linear.weight.detach()
    planes = SignPlanes(W[None] >= 0, W.abs().mean(1)[None], torch.ones(1, W.shape[1]))
    return SABLinear.from_planes(planes, linear.bias)


@torch.no_grad()
def hidden_states_fed(model: nn.Module, block: nn.Module, batch: CalibrationBatch) -> torch.Tensor:
    fed = []

    def note(_, args, kwargs):
        fed.append((args[0] if args else kwargs["hidden_states"]).clone())

    hook = block.register_forward_pre_hook(note, with_kwargs=True)
    model(**batch.inputs, use_cache=False)
    hook.remove()
    (hidden,) = fed
    return hidden


def test_deep_visual_features_are_replayed(request):
    """The Qwen3-VL case is one with injections, at image positions and nowhere else."""
    model, batches = CASES["qwen3_vl"](request)
    for state in BlockInputs(model, find_roles(model).blocks, batches).states:
        first, *others = state.injections
        assert first is None
        assert len(others) == 2
        for injection in others:
            changed = injection.abs().amax(-1) > 0
            assert torch.equal(changed, state.modality == 1)


@pytest.mark.parametrize("case", CASES)
def test_blocks_get_the_arguments_that_the_model_gives_them(case, request):
    """The real forward pass, replayed from the cache, gives the real final hidden states."""
    model, batches = CASES[case](request)
    roles = find_roles(model)
    inputs = BlockInputs(model, roles.blocks, batches)
    for index, name in enumerate(roles.blocks):
        inputs.advance(model.get_submodule(name), index)
    text_model = model.get_submodule(roles.embedding.rpartition(".")[0])
    for state, batch in zip(inputs.states, batches, strict=True):
        with torch.no_grad():
            expected = model(**batch.inputs, use_cache=False).logits
            got = model.get_output_embeddings()(text_model.norm(state.hidden))
        real = batch.modality != PADDING
        torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-4)


def test_gemma_case_has_blocks_with_different_arguments(request):
    """Else the test above would not notice blocks that share arguments."""
    model, batches = CASES["gemma3"](request)
    state = BlockInputs(model, find_roles(model).blocks, batches).states[0]
    masks = [kwargs["attention_mask"] for _, kwargs in state.calls]
    assert masks[0] is not None
    assert masks[1] is None or not torch.equal(masks[0], masks[1])
    block = model.model.layers[1]
    swapped = copy.copy(state)
    swapped.calls = [state.calls[0]] * 4
    outputs = [block(s.hidden, *s.calls[1][0], **s.calls[1][1]) for s in (state, swapped)]
    outputs = [output[0] if isinstance(output, tuple) else output for output in outputs]
    assert not torch.allclose(*outputs, rtol=1e-2)


# ---- how often the model runs


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("sensitive", [False, True])
def test_number_of_forward_passes(model, processor, make_config, batch_size, sensitive):
    """The pass that measures sensitivity adds a run of towers and projector, two of the head, and two of each block.

    Each recording of the calibration set runs one batch once more, to check that blocks can be run one by one. That norm and
    head alone give the logits is checked once, by a run of everything and one of theirs.
    """
    counts = Counter()
    watched = {
        "vision": model.get_submodule("model.vision_tower"),
        "projector": model.get_submodule("model.multi_modal_projector"),
        "head": model.lm_head,
        # By what they compute: a block that only records is called, too.
        "block 0": model.get_submodule("model.language_model.layers.0.input_layernorm"),
        "block 1": model.get_submodule("model.language_model.layers.1.input_layernorm"),
    }
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: counts.update([name]))
    changes = {"significance": "gradient"} if sensitive else {"significance": "paper", "budget": "uniform"}
    sab_hf.quantize(model, processor, None, make_config(batch_size=batch_size, refine_steps=0, **changes))
    num_batches = 4 // batch_size
    # forward, for moments and the next block, and backward
    before, head, block = (2, 3, 4) if sensitive else (1, 1, 2)
    recordings = checks = 2 if sensitive else 1
    assert counts["vision"] == counts["projector"] == before * num_batches + checks + sensitive
    assert counts["head"] == head * num_batches + checks + 2 * sensitive
    assert (
        counts["block 1"] == (block - 1) * num_batches
    )  # nobody reads what the last block gives after it is binarized
    assert (
        counts["block 0"] == (block + recordings) * num_batches + checks
    )  # once more each, to learn what blocks return


# ---- second moments


def moments_of(model, inputs, index=0, names=None):
    roles = find_roles(model)
    block = model.get_submodule(roles.blocks[index])
    linears = {n: m for n, m in language_linears(model, roles, []).items() if n.startswith(f"{roles.blocks[index]}.")}
    if names is not None:
        linears = {n: m for n, m in linears.items() if n.rpartition(".")[2] in names}
    return inputs.second_moments(block, index, linears)


def test_one_pass_gives_moments_and_the_next_inputs(model, processor, make_config, tmp_path):
    """Also where hidden states are in files, whose room is used again."""
    batches, block = image_batches(model, make_config, processor, batch_size=3), find_roles(model).blocks[0]
    workspace = Workspace.of(model, make_config(cache_ram_gib=0.0, offload_dir=str(tmp_path)))
    apart, together = (BlockInputs(model, find_roles(model).blocks, batches, w) for w in (None, workspace))
    expected = moments_of(model, apart)
    apart.advance(model.get_submodule(block), 0)
    linears = {name: model.get_submodule(name) for name in expected}
    moments = together.second_moments(model.get_submodule(block), 0, linears, advance=True)
    for name, moment in expected.items():
        for m, H in moment.matrices().items():
            torch.testing.assert_close(moments[name].matrices()[m], H)
    for ours, theirs in zip(together.states, apart.states, strict=True):
        torch.testing.assert_close(ours.hidden, theirs.hidden, rtol=0, atol=0)
    workspace.store.close()


def test_second_moments_are_those_of_the_real_inputs(model, processor, make_config):
    """Against `x xᵀ` of the tokens of each modality, collected with hooks from the real forward pass."""
    batches = image_batches(model, make_config, processor, batch_size=3)
    rows = {}

    def note(name, x, modality):
        for m in (0, 1):
            rows.setdefault((name, m), []).append(x[modality == m])

    roles = find_roles(model)
    names = [name for name in language_linears(model, roles, []) if name.startswith(f"{roles.blocks[1]}.")]
    for batch in batches:
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name, batch=batch: note(name, args[0], batch.modality)
            )
            for name in names
        ]
        with torch.no_grad():
            model(**batch.inputs, use_cache=False)
        for hook in hooks:
            hook.remove()

    inputs = BlockInputs(model, roles.blocks, batches)
    inputs.advance(model.get_submodule(roles.blocks[0]), 0)
    moments = moments_of(model, inputs, 1)
    assert moments.keys() == set(names)
    for name in names:
        for m in (0, 1):
            X = torch.cat(rows[name, m])
            assert moments[name].counts[m] == len(X)
            torch.testing.assert_close(moments[name].matrices()[m], X.T @ X / len(X), rtol=1e-3, atol=1e-4)


def test_linears_of_one_input_share_an_accumulator(model, processor, make_config):
    inputs = BlockInputs(model, find_roles(model).blocks, image_batches(model, make_config, processor))
    together = {name.rpartition(".")[2]: moment for name, moment in moments_of(model, inputs).items()}
    assert together["q_proj"] is together["k_proj"] is together["v_proj"]
    assert together["gate_proj"] is together["up_proj"]
    assert len({id(moment) for moment in together.values()}) == 4
    for name, shared in together.items():
        (alone,) = moments_of(model, inputs, names=[name]).values()
        assert alone.counts == shared.counts
        for m, H in alone.matrices().items():
            assert torch.equal(H, shared.matrices()[m])


@pytest.mark.parametrize("batch_size", [2, 4])
def test_padding_changes_no_second_moment(model, processor, make_config, batch_size):
    single = BlockInputs(model, find_roles(model).blocks, image_batches(model, make_config, processor))
    batches = image_batches(model, make_config, processor, batch_size=batch_size)
    assert any((batch.modality == PADDING).any() for batch in batches)
    padded = BlockInputs(model, find_roles(model).blocks, batches)
    for index in range(2):
        expected, got = moments_of(model, single, index), moments_of(model, padded, index)
        for name in expected:
            assert got[name].counts == expected[name].counts
            for m, H in expected[name].matrices().items():
                torch.testing.assert_close(got[name].matrices()[m], H, rtol=1e-3, atol=1e-4)
        for inputs in (single, padded):
            inputs.advance(model.get_submodule(f"model.language_model.layers.{index}"), index)


def test_linear_that_never_runs_has_no_moments(model, processor, make_config):
    block = model.get_submodule("model.language_model.layers.0")
    block.unused = nn.Linear(24, 24)
    inputs = BlockInputs(model, find_roles(model).blocks, image_batches(model, make_config, processor))
    moments = moments_of(model, inputs)
    assert not any("unused" in name for name in moments)
    sab_hf.quantize(model, processor, None, make_config())
    assert isinstance(block.unused, SABLinear)


# ---- the model is left as it was


class Stop(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("own_forward", [False, True])
def test_forward_is_restored_after_an_error(own_forward):
    model = build_llama()
    blocks = model.model.layers
    if own_forward:  # as accelerate's hooks leave it
        for block in blocks:
            block.forward = type(block).forward.__get__(block)
    before = [vars(block).get("forward") for block in blocks]

    def stop(*_):
        raise Stop

    hook = blocks[1].register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        BlockInputs(model, find_roles(model).blocks, text_batches(model))
    hook.remove()
    assert [vars(block).get("forward") for block in blocks] == before
    BlockInputs(model, find_roles(model).blocks, text_batches(model))
    assert [vars(block).get("forward") for block in blocks] == before


def test_hooks_on_linears_are_removed_after_an_error():
    model = build_llama()
    inputs = BlockInputs(model, find_roles(model).blocks, text_batches(model))
    linear = model.model.layers[0].mlp.down_proj

    def stop(*_):
        raise Stop

    hook = linear.register_forward_hook(stop)
    with pytest.raises(Stop):
        moments_of(model, inputs)
    hook.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_recording_changes_no_weight_and_no_output(model, processor, make_config, inputs):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(**inputs).logits
        BlockInputs(model, find_roles(model).blocks, image_batches(model, make_config, processor))
        assert torch.equal(model(**inputs).logits, expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# ---- what is refused


def test_model_that_skips_blocks_is_refused():
    model = build_llama()
    model.model.config.num_hidden_layers = 1  # it runs so many of its blocks
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM ran 1 of its 2 language blocks.*not supported yet"):
        BlockInputs(model, find_roles(model).blocks, text_batches(model))


def test_positions_without_a_modality_are_refused():
    model = build_llama()
    inputs = {"input_ids": ids(2, 9)}
    batch = CalibrationBatch(inputs, torch.zeros(2, 8, dtype=torch.int8))
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM turned \[2, 8\] input positions into .*\[2, 9, 40\]"):
        BlockInputs(model, find_roles(model).blocks, [batch])


def test_linear_with_more_rows_than_tokens_is_refused():
    model = build_llama()
    linear = model.model.layers[0].mlp.down_proj
    double = linear.register_forward_pre_hook(lambda _, args: (args[0].repeat(2, 1, 1),), prepend=True)
    halve = linear.register_forward_hook(lambda _, args, output: output[: len(output) // 2])
    inputs = BlockInputs(model, find_roles(model).blocks, text_batches(model))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj` gets inputs .* `modules_to_not_convert`"):
        moments_of(model, inputs)
    double.remove()
    halve.remove()


@pytest.mark.parametrize("fails", [False, True])
def test_block_is_unpacked_for_a_while(model, processor, make_config, fails):
    """As the GPU does for all batches; the CPU's own product gives the same outputs."""
    sab_hf.quantize(model, processor, None, make_config(bits=2.2, alternations=2))
    block = model.get_submodule(find_roles(model).blocks[0])
    packed = dict(block.named_modules())
    mlp = packed["mlp"]
    x = torch.randn(2, 5, mlp.gate_proj.in_features, generator=torch.Generator().manual_seed(0))
    for module in packed.values():
        if isinstance(module, SABLinear):
            module.exact = True
    with torch.no_grad(), pytest.raises(KeyError) if fails else nullcontext():
        expected = mlp(x)
        with unpacked(block):
            assert not any(isinstance(module, SABLinear) for module in block.modules())
            torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-6)
            if fails:
                raise KeyError
    assert dict(block.named_modules()) == packed
