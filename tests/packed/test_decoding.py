"""`generate` that does not wait for each token: when transformers may, and that it returns the same."""

from __future__ import annotations

import pytest
import torch
from helpers import load
from transformers.generation import BaseStreamer, utils

import sab_hf

CHECKS = getattr(utils, "DeferredStopCheck", None)
needs_checks = pytest.mark.skipif(CHECKS is None, reason="this transformers cannot")


@pytest.fixture(autouse=True)
def only_here():
    sab_hf.decode_ahead(False)  # pages of the documentation, which other tests run, turn it on
    yield
    sab_hf.decode_ahead(False)


def supported(device: str, is_assistant: bool = False) -> bool:
    return CHECKS.is_supported(torch.device(device), None, False, is_assistant=is_assistant)


@needs_checks
def test_cuda_devices_are_asked_about_like_apples():
    assert not supported("cuda")
    for _ in range(2):
        assert sab_hf.decode_ahead()
        assert supported("cuda")
        assert supported("mps")
        assert not supported("cuda", is_assistant=True)
        assert not supported("cpu")
    assert not sab_hf.decode_ahead(False)
    assert not supported("cuda")
    assert supported("mps")


def test_a_transformers_that_cannot_is_named(monkeypatch, caplog):
    monkeypatch.delattr(utils, "DeferredStopCheck", raising=False)
    assert not sab_hf.decode_ahead(False)
    assert not caplog.records
    assert not sab_hf.decode_ahead()
    assert "5.17" in caplog.text


class Tokens(BaseStreamer):
    """Keeps the ids that it is given."""

    def __init__(self):
        self.ids = []

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ids.append("end")


class CpuEvent:
    """What has been queued on a CPU has also been done."""

    def __init__(self, **options):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass


@needs_checks
@pytest.mark.parametrize("cache", [None, "static"])
def test_tokens_are_the_same(vlm_dir, make_config, inputs, device, monkeypatch, cache):
    model = load(vlm_dir, quantization_config=make_config()).to(device)
    one = {name: tensor[:1].to(device) for name, tensor in inputs.items()}

    def generate(**options) -> tuple[list[int], list]:
        streamer = Tokens()
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache} | options
        return model.generate(**one, **options, streamer=streamer)[0].tolist(), streamer.ids

    whole = generate(eos_token_id=[])
    third = whole[0][-6]
    ended = generate(eos_token_id=[third])
    assert len(ended[0]) < len(whole[0])
    if device.type == "cuda":
        assert sab_hf.decode_ahead()
    else:  # transformers has no such loop for CPUs; its steps are the same
        monkeypatch.setattr(torch, "Event", CpuEvent)
        monkeypatch.setattr(CHECKS, "is_supported", staticmethod(lambda *_, **__: True))
    checked = []
    finish = CHECKS.finish
    monkeypatch.setattr(CHECKS, "finish", lambda self: checked.append(finish(self)) or checked[-1])
    assert generate(eos_token_id=[]) == whole
    assert generate(eos_token_id=[third]) == ended
    assert checked == [0, 1]  # tokens thrown away
