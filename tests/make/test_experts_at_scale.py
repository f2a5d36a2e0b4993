"""Mixtures of experts with what bounds memory and time: resume, several processes, offloading, measured sensitivity."""

from __future__ import annotations

import gc

import accelerate
import pytest
import torch
from family_zoo import FAMILIES
from helpers import V5
from safetensors.torch import load_file
from scale_worker import MEASURED, launch, run
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import sab_hf
from sab_hf import SABLinear, SABQuantizationConfig
from sab_hf.anatomy.roles import find_roles
from sab_hf.anatomy.selection import language_linears
from sab_hf.calibration import CalibrationBatch, token_modality
from sab_hf.machine.weights import iter_weights, parameter_of
from sab_hf.packed.experts import expert_name, fused_parameters, split_experts
from sab_hf.passes.capture import BlockInputs
from sab_hf.passes.gradients import measure_sensitivity
from sab_hf.publish.inspect import inspect

MIXTURE = "qwen3_moe"
FUSED = ["llama4_text", "qwen3_vl_moe"]
"""Families whose experts are fused under all versions; Llama 4 stores them transposed."""


def config(batches, **changes) -> SABQuantizationConfig:
    values = {
        "calibration": batches,
        "num_samples": 8,
        "refine_steps": 1,
        "distil_steps": 0,
        "alternations": 1,
        "bits": 2.2,
    }
    return SABQuantizationConfig(**values | changes)


def calibration(family) -> list[CalibrationBatch]:
    return [CalibrationBatch(inputs, token_modality(inputs, family.model.config)) for inputs in family.batches]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", [MIXTURE, *FUSED])
def test_resumed_experts_are_those_of_an_uninterrupted_run(name, tmp_path):
    """With the measured sensitivity, which is a stage of its own, and both blocks or one committed."""
    changes = MEASURED | {"bits": 2.2, "checkpoint_dir": str(tmp_path)}
    expected = run(name, **changes)
    blocks = sorted(file for file in tmp_path.glob("*.safetensors") if file.stem != "sensitivity")
    assert len(blocks) == 2
    for kept in (2, 1):
        for file in blocks[kept:]:
            file.unlink()
        again = run(name, **changes)
        assert same(again.state_dict(), expected.state_dict())
        assert [fit.fallback for fit in again.sab_record.fits] == [fit.fallback for fit in expected.sab_record.fits]


def test_two_processes_give_the_experts_of_one(tmp_path):
    """An expert may get tokens in one of them only. Without refinement, which amplifies rounding."""
    changes = MEASURED | {"family": MIXTURE, "refine_steps": 0, "bits": 2.2}
    assert launch(2, tmp_path / "RANK.safetensors", tmp_path, **changes) == [0, 0], [
        file.read_text() for file in tmp_path.glob("error *")
    ]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    alone = run(**changes).state_dict()
    assert same(first, second)
    assert first.keys() == alone.keys()
    for name in (n for n in alone if ".layers.0." in n and n.endswith("signs")):
        assert (first[name] == alone[name]).float().mean() > 0.95, name


def test_process_for_whose_samples_a_block_never_runs_works_with_the_others(tmp_path):
    """The first sample is text, so the process that has it alone runs no cross-attention."""
    changes = {"family": "mllama", "num_samples": 4, "batch_size": 1, "refine_steps": 1, "bits": 2.2} | MEASURED
    assert launch(4, tmp_path / "RANK.safetensors", tmp_path, **changes) == [0] * 4, [
        file.read_text() for file in tmp_path.glob("error *")
    ]
    states = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(4)]
    assert all(same(states[0], state) for state in states[1:])


@pytest.mark.parametrize("name", [MIXTURE, *FUSED])
def test_packed_experts_are_inspected_and_their_checksums_checked(name, tmp_path):
    family = FAMILIES[name]()
    sab_hf.quantize(family.model, None, None, config(family.batches))
    family.model.save_pretrained(tmp_path)
    found = inspect(tmp_path, verify=True)
    assert {module.name for module in found.report.modules} == {
        n for n, m in family.model.named_modules() if isinstance(m, SABLinear)
    }
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        type(family.model).from_pretrained(tmp_path)


@pytest.mark.parametrize("name", FUSED)
def test_weights_of_fused_experts_are_read_one_parameter_at_a_time(name):
    """The same matrices as those of the experts taken apart, without taking them apart or copying them."""
    model = FAMILIES[name]().model
    names = list(language_linears(model, find_roles(model), []))
    fused = fused_parameters(model)
    assert fused
    assert {parameter_of(model, expert_name(f, 1)) for f in fused} == set(fused)
    parameters = {p.data_ptr(): p for p in model.parameters()}
    read = {}
    for linear, weight in iter_weights(model, names):
        storage = weight.untyped_storage().data_ptr()
        assert storage in {p.untyped_storage().data_ptr() for p in parameters.values()}
        read[linear] = weight.clone()
    assert fused_parameters(model) == fused
    split_experts(model, names)
    assert read.keys() == set(names)
    assert all(torch.equal(weight, model.get_submodule(linear).weight) for linear, weight in read.items())
    assert dict(iter_weights(model, names)).keys() == read.keys()


@pytest.mark.parametrize("name", FUSED)
def test_dense_experts_die_block_by_block(name, monkeypatch):
    """A fused weight is alive as long as anything shares its memory, as each of its experts does while it is dense."""
    family = FAMILIES[name]()
    storages = {n: family.model.get_parameter(n).untyped_storage() for n in fused_parameters(family.model)}
    alive = {n: StorageWeakRef(storage) for n, storage in storages.items()}
    del storages
    seen = []
    original = BlockInputs.advance

    def spy(self, block, index):
        if self.states and not self.keeps:  # no samples are written
            gc.collect()
            seen.append({n for n, storage in alive.items() if not storage.expired()})
        return original(self, block, index)

    monkeypatch.setattr(BlockInputs, "advance", spy)
    sab_hf.quantize(family.model, None, None, config(family.batches))
    assert len(seen) == 1
    assert seen[0] == {n for n in alive if ".0." not in n} != set()
    gc.collect()
    assert all(storage.expired() for storage in alive.values())


@pytest.mark.parametrize("name", [MIXTURE, "qwen3_vl_moe"] if V5 else [MIXTURE])  # others' own forward fails offloaded
def test_offloaded_experts_give_the_model_from_memory(name):
    expected, family = (FAMILIES[name]() for _ in range(2))
    sab_hf.quantize(expected.model, None, None, config(expected.batches))
    accelerate.cpu_offload(family.model, execution_device="cpu")
    assert all(p.is_meta for p in family.model.parameters() if p.ndim == 3)
    sab_hf.quantize(family.model, None, None, config(family.batches))
    blocks = find_roles(expected.model).blocks
    state = family.model.state_dict()
    for key, tensor in expected.model.state_dict().items():
        if key.startswith(blocks):
            assert torch.equal(state[key], tensor), key


@pytest.mark.parametrize("name", [MIXTURE, *FUSED])
def test_sensitivity_of_experts_is_that_of_the_tokens_sent_to_them(name):
    """Against one backward pass of the whole model: sums of squared gradients at each expert's output."""
    family = FAMILIES[name]()
    if V5:
        family.model.set_experts_implementation("eager")
    model, batches, roles = family.model, calibration(family), find_roles(family.model)
    names = list(language_linears(model, roles, []))
    inputs = BlockInputs(model, roles.blocks, batches)
    before = {n: id(p) for n, p in model.named_parameters()}
    result = measure_sensitivity(model, inputs, batches, roles.blocks, names, damping=0.01, num_samples=8, seed=3)
    assert {n: id(p) for n, p in model.named_parameters()} == before
    experts = [n for n in names if "experts" in n and "shared" not in n]
    assert experts
    split_experts(model, names)
    linears = {n: model.get_submodule(n) for n in names}
    expected = _summed_squares(model, linears, batches, seed=3)
    measured = [n for n in names if n in result.linears]
    assert len([n for n in measured if n in experts]) > len(experts) // 2
    for n in measured:
        at = result.linears[n]
        got = sum(at.gradient[m] * at.tokens[m] for m in at.gradient)
        torch.testing.assert_close(got, expected[n], rtol=2e-3, atol=1e-6)


def _summed_squares(model, linears, batches, seed) -> dict[str, torch.Tensor]:
    sums: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(batches):
        outputs = []
        hooks = [
            m.register_forward_hook(lambda _, args, output, n=n, outputs=outputs: outputs.append((n, args[0], output)))
            for n, m in linears.items()
        ]
        logits = model(**batch.inputs, use_cache=False).logits.float().flatten(0, 1)
        for hook in hooks:
            hook.remove()
        generator = torch.Generator().manual_seed(seed + number)
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
        gradients = torch.autograd.grad(loss, [output for *_, output in outputs], allow_unused=True)
        for (n, x, _), gradient in zip(outputs, gradients, strict=True):
            if gradient is not None:  # Llama 4 also runs experts on zeros in place of tokens that were not sent there
                sent = gradient[x.detach().any(-1)]
                sums[n] = sums.get(n, 0) + sent.square().sum(0)
    return sums


def test_packed_mixture_that_writes_in_place_has_gradients():
    """Llama 4 adds to what a Linear gave, in place."""
    family = FAMILIES["llama4_text"]()
    sab_hf.quantize(family.model, None, None, config(family.batches))
    embedded = family.model.get_input_embeddings()(family.batches[0]["input_ids"]).detach().requires_grad_(True)
    family.model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.abs().sum() > 0
