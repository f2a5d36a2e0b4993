"""Designs of the portable mode on a tiny language model: what runs is the design that a row names."""

from __future__ import annotations

import math
from pathlib import Path

import portable
import pytest
import torch
from helpers import build_llama, build_tokenizer
from runner import Job
from torch import nn

import sab_hf
from sab_hf.make import plan

OPTIONS = {"alternations": 1, "refine_steps": 0, "distil_steps": 0, "fit": "elementwise", "significance": "none"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("portable")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    build_llama(hidden_size=48, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1).save_pretrained(
        folder
    )
    for split in ("valid", "test"):
        (folder / f"wikitext2_{split}.txt").write_text("Some words, and some more of them. " * 30)
    return portable.DesignSettings(
        model=str(folder), device="cpu", questions=1, samples=2, batch_size=2, eval_batch=2, threads=1, text=str(folder),
        length=64, window=64, windows=2, group=24,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", portable.DESIGNS)
def test_every_design_runs_where_128_divides_no_row(name, settings, monkeypatch):
    seen = {}
    report = sab_hf.report
    monkeypatch.setattr(sab_hf, "report", lambda model: (seen.update(model=model), report(model))[1])
    bits = 2.0 if name == portable.OWN else None
    options = OPTIONS if name == portable.OWN else OPTIONS | {"portable": "gguf"}
    row = portable.do(Job(name, name, 0, bits, options), settings)
    assert math.isfinite(row["perplexity"])
    packed = {name: m for name, m in seen["model"].named_modules() if isinstance(m, sab_hf.SABLinear)}
    grouped = name == portable.GROUPS
    assert len(packed) == (2 * (6 * 2 + 4) if grouped else 14)
    assert all(m.in_features == 24 for m in packed.values()) is grouped
    if name != portable.OWN:
        assert row["bits"] == 1 + 16 / (24 if grouped else 128)
        assert all((m.col_scale.view(torch.float16) == 1).all() for m in packed.values())
    with pytest.raises(ValueError, match="a multiple of 128"):  # as before
        plan.check_rows({"a": (1, 64)})


def test_a_linear_taken_apart_computes_the_same():
    linear = nn.Linear(12, 5)
    x = torch.randn(3, 12)
    torch.testing.assert_close(portable.GroupedLinear(linear, 4)(x), linear(x))


@pytest.mark.parametrize("text", [[], ["--text", "texts"]])
def test_rows_are_listed_with_and_without_a_text(text, capsys):
    model = Path(__file__).parents[2] / "examples" / "tiny_vlm" / "checkpoint"
    portable.main([str(model), *text, "--list"])
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 2 + len(portable.DESIGNS)
    assert listed[:3] == [
        f"{name} (seed 0)"
        for name in (
            "full precision",
            f"{portable.OWN}, 1.106 bits",
            f"{portable.OWN}, 1.125 bits",
        )
    ]
