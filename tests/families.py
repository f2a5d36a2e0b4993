"""Quantize, generate, save and reload a tiny random model of every family, and write docs/families.md.

python tests/families.py [FAMILY ...]            # check families on the installed transformers
python tests/families.py --rest-bits 4 ...       # with towers, projector, embedding and head packed too (may be repeated: 16 4)
python tests/families.py --json results.json     # the same, and keep the results
python tests/families.py --table results*.json   # write docs/families.md from results of several versions
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from family_zoo import FAMILIES, Family
from family_zoo.table import write_table
from torch import Tensor, nn

import sab_hf
from sab_hf import SABQuantizationConfig
from sab_hf.anatomy.roles import find_roles
from sab_hf.anatomy.selection import is_plain_linear, is_worth_packing
from sab_hf.config import DENSE
from sab_hf.machine.workspace import Workspace
from sab_hf.make.plan import make_plan
from sab_hf.packed.experts import fused_name, fused_parameters, oriented
from sab_hf.packed.linear import SABModule
from sab_hf.passes.capture import BlockInputs
from sab_hf.passes.order import in_running_order

NEW_TOKENS = 4


@dataclass
class Outcome:
    """What became of one family on one version of transformers.

    Attributes:
        family, version: which.
        rest_bits: planes of what is outside the language blocks; 16: dense.
        problem: why it does not work; None if it does.
        quantized: Linears by kind (the last parts of their names, numbers left open) → how many.
        coverage: share of the language weights that was quantized.
        stages: lists of language blocks.
        modalities: those of the calibration tokens.
        vision: prefixes of the towers.
        fallbacks: experts that saw too few tokens.
        measured: whether the sensitivity of the loss could be measured.
    """

    family: str
    version: str
    problem: str | None = None
    rest_bits: int = DENSE
    quantized: dict[str, int] = field(default_factory=dict)
    coverage: float = 0.0
    stages: int = 0
    modalities: list[str] = field(default_factory=list)
    vision: list[str] = field(default_factory=list)
    fallbacks: int = 0
    measured: bool = True


def check(name: str, folder: Path, rest_bits: int = DENSE) -> Outcome:
    """Take a family through its life: dense checkpoint, quantized while loading, generating, saved, reloaded.

    Args:
        name: of the family.
        folder: where checkpoints go.
        rest_bits: planes of towers, projector, embedding and head.
    Raises:
        AssertionError: a result is not what it must be. Any other error is one of the model or the package.
    """
    family = FAMILIES[name]()
    model_class, inputs = type(family.model), family.batches[-1]
    dense = dense_logits(family.model, inputs)
    family.model.save_pretrained(folder / "dense")
    assert_blocks_get_what_the_model_gives(family)
    config = SABQuantizationConfig(
        calibration=family.batches,
        num_samples=8,
        refine_steps=1,
        distil_steps=1,
        alternations=1,
        rest_bits=rest_bits,
        **family.settings,
    )
    model = load(model_class, folder / "dense", quantization_config=config)
    roles = find_roles(model)
    assert_nothing_dense(model, roles.blocks, family.settings.get("modules_to_not_convert", []))
    packed = [n for n, m in model.named_modules() if isinstance(m, SABModule)]
    inside = [n for n in packed if in_blocks(n, roles.blocks)]
    assert (rest_bits != DENSE) == (len(inside) < len(packed)), "what is outside the blocks is not as asked"
    assert_as_the_planes_say(model, load(model_class, folder / "dense"), inputs)
    expected = logits(model, inputs)
    text = generate(model, inputs) if family.generates else None
    assert expected.isfinite().all(), "logits are not finite"
    assert (expected - dense).abs().max() > 1e-3, "logits are those of the dense model"
    model.save_pretrained(folder / "packed")
    again = load(model_class, folder / "packed")
    assert torch.equal(logits(again, inputs), expected), "logits differ after reloading"
    assert text is None or torch.equal(generate(again, inputs), text), "generated tokens differ after reloading"
    record = model.hf_quantizer.record
    return Outcome(
        name,
        transformers.__version__,
        rest_bits=rest_bits,
        quantized=dict(Counter(kind(n, roles.blocks) for n in inside)),
        coverage=sab_hf.report(again).coverage.share,
        stages=len(roles.stacks),
        modalities=sorted({m for fit in record.fits for m in fit.tokens}),
        vision=list(roles.vision),
        fallbacks=len(record.fallbacks),
        measured=record.measured,
    )


def load(model_class: type, path: Path, **kwargs) -> nn.Module:
    model = model_class.from_pretrained(path, dtype=torch.float32, **kwargs).eval()
    for parameter in model.parameters():  # files are mapped: products depend on how a weight is aligned in memory
        parameter.data = parameter.data.clone()
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None  # so that generation has a known length
    return model


def assert_nothing_dense(model: nn.Module, blocks: tuple[str, ...], skipped: list[str]) -> None:
    """Check that no Linear of the language blocks is dense but routers, the `skipped` and those too small to shrink, and no
    fused expert.
    """
    assert not fused_parameters(model, blocks), "fused experts stayed dense"
    dense = [
        f"{block}.{name}"
        for block in blocks
        for name, module in model.get_submodule(block).named_modules()
        if is_plain_linear(module) and is_worth_packing(module)
    ]
    allowed = ("gate", "router", "proj", *skipped)
    assert all(name.rpartition(".")[2] in allowed for name in dense), f"dense: {dense}"


@torch.no_grad()
def assert_blocks_get_what_the_model_gives(family: Family) -> None:
    """Check that hidden states passed from block to block are those that the model's own forward gives each block."""
    model, config = family.model, SABQuantizationConfig(calibration=family.batches[-1:], **family.settings)
    plan, fed = make_plan(model, config), {}
    batches, workspace = plan.calibration.batches, Workspace.of(model)
    roles = in_running_order(model, plan.roles, batches, workspace)

    def note(name: str):
        return lambda _, args, kwargs: fed.update({name: (args[0] if args else kwargs["hidden_states"]).clone()})

    hooks = [model.get_submodule(n).register_forward_pre_hook(note(n), with_kwargs=True) for n in roles.blocks]
    torch.manual_seed(0)  # VibeVoice draws noise
    model(**without(batches[0].inputs, "modality"), use_cache=False)
    for hook in hooks:
        hook.remove()
    for stage in roles.stacks:
        later = roles.blocks[roles.blocks.index(stage[-1]) + 1 :]
        torch.manual_seed(0)
        inputs = BlockInputs(model, stage, batches, workspace, later, all_run=False)
        for index, name in enumerate(stage):
            if name in fed:
                difference = (inputs.states[0].hidden - fed[name]).abs().max() / fed[name].abs().max()
                assert difference < 1e-4, f"{name} gets other hidden states than the model gives it ({difference:.1e})"
            inputs.advance(model.get_submodule(name), index)


@torch.no_grad()
def assert_as_the_planes_say(model: nn.Module, dense: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Check that a packed model computes what the dense one computes with the weights that the planes make."""
    exact = copy.deepcopy(model)
    for module in exact.modules():
        if hasattr(module, "exact"):
            module.exact = True
    others = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():  # norms and biases, which are refined too
        if name in others and parameter.is_floating_point():
            others[name].copy_(parameter)
    for name, module in model.named_modules():
        if isinstance(module, SABModule):
            W = module.planes().dense(torch.float32)
            fused = fused_name(name)
            if fused is None:
                dense.get_submodule(name).weight.copy_(W)
            else:
                oriented(dense, fused, dense.get_parameter(fused)[int(name.rpartition(".")[2])]).copy_(W)
    expected, got = logits(dense, inputs), logits(exact, inputs)
    error = (got - expected).norm() / expected.norm()
    assert error < 1e-3, f"logits are not those of the planes' weights: relative error {error:.1e}"


def in_blocks(name: str, blocks: tuple[str, ...]) -> bool:
    return any(name.startswith(f"{block}.") for block in blocks)


def kind(name: str, blocks: tuple[str, ...]) -> str:
    block = next(block for block in blocks if name.startswith(f"{block}."))
    return ".".join("*" if part.isdigit() else part for part in name[len(block) + 1 :].split("."))


def dense_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    try:
        return logits(model, inputs)
    except Exception as error:
        raise RuntimeError(f"transformers cannot run the dense model ({type(error).__name__}: {error})") from error


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)  # VibeVoice draws noise
    return model(**without(inputs, "modality")).logits


def generate(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model.generate(**without(inputs, "labels", "modality"), max_new_tokens=NEW_TOKENS, do_sample=False)


def without(inputs: dict[str, Tensor], *keys: str) -> dict[str, Tensor]:
    return {
        key: value.clone() for key, value in inputs.items() if key not in keys
    }  # BLIP's `generate` writes into them


def run(names: list[str], rest_bits: Sequence[int] = (DENSE,), kept: Path | None = None) -> list[Outcome]:
    """Check families, and write the outcomes so far to the file `kept` after each."""
    outcomes = []
    for name, bits in itertools.product(names, rest_bits):
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = check(name, Path(folder), bits)
            except Exception as error:  # a row of the table says what does not work
                said = (
                    str(error) if isinstance(error, (ImportError, RuntimeError)) else f"{type(error).__name__}: {error}"
                )
                outcome = Outcome(name, transformers.__version__, said.split("\n")[0][:300], bits)
        outcomes.append(outcome)
        if kept:
            kept.write_text(json.dumps([asdict(done) for done in outcomes], indent=1))
        print(f"{name:<22} {bits:>2} {outcome.problem or f'ok, {100 * outcome.coverage:.1f} % covered'}", flush=True)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="names; all if none is given")
    parser.add_argument("--rest-bits", type=int, nargs="+", default=[DENSE], help="16 (dense), 4 or both")
    parser.add_argument("--json", type=Path, help="write the outcomes to this file")
    parser.add_argument(
        "--table", type=Path, nargs="+", help="read outcomes from these files and write docs/families.md"
    )
    args = parser.parse_args()
    if args.table:
        write_table([outcome for file in args.table for outcome in json.loads(file.read_text())])
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("sab_hf").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    run(args.families or list(FAMILIES), args.rest_bits, args.json)


if __name__ == "__main__":
    main()
