"""Tiny random models of real classes, saved with a processor, and helpers that the tests share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers import build_llava, build_processor, build_samples, load, save_dense
from loopback_hub import running_hub
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

import sab_hf
from sab_hf import SABQuantizationConfig


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: left out unless asked for with -m slow")


def pytest_collection_modifyitems(config, items):
    if "slow" not in (config.option.markexpr or ""):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    return torch.device(request.param)


# ---- fixtures


@pytest.fixture(scope="session")
def samples() -> list[list[dict]]:
    return build_samples()


@pytest.fixture(scope="session")
def processor() -> LlavaProcessor:
    return build_processor()


@pytest.fixture(scope="session")
def vlm_dir(tmp_path_factory) -> Path:
    """A saved dense LLaVA with its processor and with biases in the attention of its language blocks."""
    return save_dense(build_llava(attention_bias=True), tmp_path_factory.mktemp("vlm"))


@pytest.fixture
def model() -> LlavaForConditionalGeneration:
    """The model of `vlm_dir`, in memory."""
    return build_llava(attention_bias=True)


@pytest.fixture(scope="session")
def make_config(samples):
    """Return a config that is calibrated in a moment; keyword arguments change it."""

    def make(**changes) -> SABQuantizationConfig:
        values = {"calibration": samples, "num_samples": 4, "alternations": 1, "refine_steps": 0, "distil_steps": 0}
        values |= {"budget": "uniform"}  # so that every module has a residual plane
        return SABQuantizationConfig(**values | changes)

    return make


@pytest.fixture(scope="session")
def packed_dir(vlm_dir, make_config, tmp_path_factory) -> Path:
    """`vlm_dir`, binarized and saved. Read only: copy it before changing a file."""
    path = tmp_path_factory.mktemp("packed")
    load(vlm_dir, quantization_config=make_config()).save_pretrained(path)
    build_processor().save_pretrained(path)
    return path


@pytest.fixture
def damage(packed_dir, tmp_path):
    """Return a function that copies `packed_dir` with changed tensors and config: `damage(tensors=f, config=g)`.

    The copy has no checksums, so that the checks behind them are reached; `test_checksums.py` tests the checksums.
    """

    def copy(tensors=None, config=None) -> Path:
        path = tmp_path / "damaged"
        shutil.copytree(packed_dir, path)
        if tensors is not None:
            content = load_file(path / "model.safetensors")
            tensors(content)
            save_file(content, path / "model.safetensors", metadata={"format": "pt"})
        content = json.loads((path / "config.json").read_text())
        content["quantization_config"]["checksums"] = None
        if config is not None:
            config(content["quantization_config"])
        (path / "config.json").write_text(json.dumps(content))
        return path

    return copy


@pytest.fixture
def inputs(samples, processor) -> dict[str, Tensor]:
    """A processed prompt with an image."""
    prompt = processor.apply_chat_template(samples[5][:1], tokenize=False, add_generation_prompt=True)
    return dict(processor(text=[prompt], images=[samples[5][0]["content"][0]["image"]], return_tensors="pt"))


@pytest.fixture(scope="module")
def saved(packed_dir, tmp_path_factory) -> Path:
    """A packed checkpoint with processor, card and report."""
    path = tmp_path_factory.mktemp("saved") / "tiny-sab"
    sab_hf.save(load(packed_dir), build_processor(), path)
    return path


@pytest.fixture
def questions(tmp_path) -> str:
    """A file of questions with answers."""
    rows = [{"question": f"Say {i}.", "answer": f"It is {i}, as you wished."} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "data.jsonl")


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine, and the client of this process pointed at it."""
    with running_hub() as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (
            huggingface_hub.constants,
            huggingface_hub.file_download,
        ):  # old versions of the client have a copy
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # else the client of another hub
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_loopback")
        yield running
