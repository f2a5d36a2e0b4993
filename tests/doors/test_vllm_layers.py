"""Packed layers in vLLM itself: built, loaded and shared by two processes; and what vLLM says of checkpoints that are no good.

Skipped where vLLM is not installed; `.ci/vllm` has an environment with it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import inputs, random_planes
from processes import FORK, begin_forked
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

vllm = pytest.importorskip("vllm")

from vllm.config import VllmConfig, get_current_vllm_config, set_current_vllm_config  # noqa: E402
from vllm.distributed import (  # noqa: E402
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory  # noqa: E402
from vllm.model_executor.layers.linear import (  # noqa: E402
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding  # noqa: E402
from vllm.model_executor.models.utils import WeightsMapper  # noqa: E402

from sab_hf import SABQuantizationConfig  # noqa: E402
from sab_hf.packed.verify import PackedSize  # noqa: E402
from sab_hf.packing import to_tensors  # noqa: E402
from sab_hf.vllm import register  # noqa: E402
from sab_hf.vllm.config import SABConfig  # noqa: E402
from sab_hf.vllm.experts import SABExpertsMethod  # noqa: E402
from sab_hf.vllm.methods import SABLinearMethod  # noqa: E402
from sab_hf.vllm.shards import ROW_AXIS  # noqa: E402

HIDDEN, VOCABULARY = 40, 70
MAPPING = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
PLANES = {
    "model.attn.q_proj": random_planes(32, HIDDEN, 1, 4),
    "model.attn.k_proj": random_planes(16, HIDDEN, 2, 0, seed=1),
    "model.attn.v_proj": random_planes(16, HIDDEN, 1, 9, seed=2),
    "model.mlp.gate_proj": random_planes(36, HIDDEN, 1, 3, seed=3),
    "model.mlp.up_proj": random_planes(36, HIDDEN, 1, 0, seed=4),
    "model.mlp.down_proj": random_planes(HIDDEN, 36, 1, 5, seed=5),
    "model.embed_tokens": random_planes(VOCABULARY, HIDDEN, 3, 0, seed=6),
    "lm_head": random_planes(VOCABULARY, HIDDEN, 2, 6, seed=7),
}
INNER = 36
EXPERTS = {
    f"model.mlp.experts.split.{matrix}.{number}": random_planes(*shape, 1, 3 * number, seed=10 + number)
    for number in range(3)
    for matrix, shape in {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}.items()
}


def make_config(*names: str, **changes) -> SABConfig:
    """Return the method for some of the matrices above, or for all."""
    config = SABConfig(SABQuantizationConfig(**changes))
    config.packed_modules_mapping = MAPPING
    for name in names or PLANES:
        planes = (PLANES | EXPERTS)[name]
        config.sizes[name] = PackedSize(*planes.shape, planes.num_planes, planes.num_significant)
    return config


def load(layer: torch.nn.Module, shards: dict) -> torch.nn.Module:
    """Hand a layer its tensors as vLLM's loaders do; shard → name of the matrix."""
    for shard, name in shards.items():
        for part, tensor in to_tensors(PLANES[name]).items():
            parameter = getattr(layer, part)
            parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def make_experts(**changes) -> torch.nn.Module:
    """Return vLLM's layer of three experts, of which a token gets two, for the matrices of `EXPERTS`."""
    values = {"quant_config": make_config(*EXPERTS), "prefix": "model.mlp.experts"} | changes
    return FusedMoEFactory(3, 2, HIDDEN, INNER, params_dtype=torch.float32, **values).routed_experts


def expert_tensors() -> dict[str, torch.Tensor]:
    """Return the tensors of `EXPERTS` as a file holds them, relative to the layer."""
    return {
        f"{name.removeprefix('model.mlp.experts.')}.{part}": tensor
        for name, planes in EXPERTS.items()
        for part, tensor in to_tensors(planes).items()
    }


def run_experts(layer: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what the experts give for `CHOSEN`, on this rank."""
    assert set(layer.load_weights(iter(tensors.items()))) == {"w13_weight"}
    layer.quant_method.process_weights_after_loading(layer)
    weights, ids = CHOSEN
    return layer.quant_method.apply(layer, inputs(4, HIDDEN), weights, ids, None, None)


CHOSEN = torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.9, 0.1], [0.4, 0.6]]), torch.tensor([[0, 2], [2, 0], [0, 2], [2, 0]])
"""Weights and numbers of the experts of four tokens; the second expert gets none."""


def expected_experts(down: dict[int, torch.Tensor] | None = None) -> torch.Tensor:
    """Return the sum that dense experts give; down: other second matrices."""
    x, y = inputs(4, HIDDEN), torch.zeros(4, HIDDEN)
    for token, (weights, ids) in enumerate(zip(*(values.tolist() for values in CHOSEN), strict=True)):
        for weight, number in zip(weights, ids, strict=True):
            W = {m: EXPERTS[f"model.mlp.experts.split.{m}.{number}"].dense() for m in ("gate_up_proj", "down_proj")}
            gate, up = (W["gate_up_proj"] @ x[token]).chunk(2)
            second = W["down_proj"] if down is None else down[number]
            y[token] += weight * (second @ (torch.nn.functional.silu(gate) * up))
    return y


def run_layers() -> dict[str, torch.Tensor]:
    """Return outputs of each kind of layer, gathered from all ranks where they are shared."""
    config, x = make_config(), inputs(3, HIDDEN)
    named = {"quant_config": config, "return_bias": False, "bias": False}
    qkv = QKVParallelLinear(HIDDEN, 8, 4, 2, prefix="model.attn.qkv_proj", **named)
    up = MergedColumnParallelLinear(HIDDEN, [36, 36], prefix="model.mlp.gate_up_proj", **named)
    down = RowParallelLinear(36, HIDDEN, prefix="model.mlp.down_proj", **named | {"bias": True})
    embed = VocabParallelEmbedding(VOCABULARY, HIDDEN, quant_config=config, prefix="model.embed_tokens")
    head = ParallelLMHead(VOCABULARY, HIDDEN, quant_config=config, prefix="lm_head")
    load(qkv, {"k": "model.attn.k_proj", "q": "model.attn.q_proj", "v": "model.attn.v_proj"})
    load(up, {0: "model.mlp.gate_proj", 1: "model.mlp.up_proj"})
    load(down, {None: "model.mlp.down_proj"})
    down.bias.data.copy_(inputs(HIDDEN, seed=9))
    load(embed, {None: "model.embed_tokens"})
    load(head, {None: "lm_head"})
    gate, value = up(x).chunk(2, -1)
    return {
        "qkv": qkv(x),
        "mlp": down(torch.nn.functional.silu(gate) * value),
        "embed": embed(torch.tensor([0, 5, 63, 64, 69])),
        "logits": head.quant_method.apply(head, x),
        "experts": run_experts(make_experts(), expert_tensors()),
    }


def in_group(rank: int, ranks: int, store: Path) -> dict[str, torch.Tensor]:
    """Run the layers as one of several ranks."""
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(ranks, rank, f"file://{store}", 0, "gloo")
        initialize_model_parallel(ranks)
        results = run_layers()
        cleanup_dist_env_and_memory()
    return results


def _rank(rank: int, folder: Path) -> None:
    begin_forked()
    save_file(in_group(rank, 2, folder / "store"), folder / f"{rank}.safetensors")


@pytest.fixture(scope="module", autouse=True)
def registered():
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    register()


@pytest.fixture
def alone(tmp_path):
    """The layers' group, of one process."""
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{tmp_path / 'one'}", 0, "gloo")
        initialize_model_parallel(1)
        yield
        cleanup_dist_env_and_memory()


def test_two_ranks_give_the_outputs_of_one(tmp_path):
    """Planes cut inside of bytes (36 columns, 18 on each rank), significant columns dealt out, a vocabulary filled up."""
    processes = [FORK.Process(target=_rank, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    one, x = in_group(0, 1, tmp_path / "one"), inputs(3, HIDDEN)
    W = {name: planes.dense() for name, planes in PLANES.items()}
    gate, up = x @ W["model.mlp.gate_proj"].T, x @ W["model.mlp.up_proj"].T
    mlp = (torch.nn.functional.silu(gate) * up) @ W["model.mlp.down_proj"].T + inputs(HIDDEN, seed=9)
    expected = {
        "qkv": torch.cat([x @ W[f"model.attn.{part}_proj"].T for part in "qkv"], -1),
        "mlp": mlp,
        "embed": W["model.embed_tokens"][[0, 5, 63, 64, 69]],
        "logits": torch.nn.functional.pad(x @ W["lm_head"].T, (0, 128 - VOCABULARY)),
    }
    for name, want in expected.items():
        assert torch.allclose(one[name], want, rtol=1e-4, atol=1e-3), name
    for name in ("mlp", "embed"):  # added up over the ranks
        for both in (first, second):
            assert torch.allclose(both[name], expected[name], rtol=1e-4, atol=1e-3), name
    wanted = expected_experts()  # vLLM adds up what the ranks give
    assert torch.allclose(one["experts"], wanted, rtol=1e-4, atol=1e-3)
    assert torch.allclose(first["experts"] + second["experts"], wanted, rtol=1e-4, atol=1e-3)
    logits = torch.cat([first["logits"], second["logits"]], -1)
    assert torch.allclose(logits, expected["logits"], rtol=1e-4, atol=1e-3)
    parts = [[q.chunk(2, -1)[rank] for q in expected["qkv"].split([32, 16, 16], -1)] for rank in range(2)]
    for got, want in zip((first, second), parts, strict=True):
        assert torch.allclose(got["qkv"], torch.cat(want, -1), rtol=1e-4, atol=1e-3)


def test_dense_linears_stay_vllms_own(alone):
    layer = RowParallelLinear(36, HIDDEN, quant_config=make_config(), prefix="model.other", bias=False)
    assert type(layer.quant_method) is UnquantizedLinearMethod


def test_modules_without_a_layer_are_named_before_loading(alone):
    config = make_config()
    layer = RowParallelLinear(36, HIDDEN, quant_config=config, prefix="model.mlp.down_proj", bias=False)
    with pytest.raises(
        ValueError, match=r"no layer that can be packed for 7 packed modules, first `model\.attn\.q_proj`"
    ):
        config.get_checkpoint_weight_mapper()
    with pytest.raises(ValueError, match="for 7 packed modules"):  # a model with a loader of its own
        layer.quant_method.process_weights_after_loading(layer)


def test_marker_is_left_out_and_names_are_mapped(alone):
    config = make_config("lm_head", "model.embed_tokens")
    config.markers = ["lm_head.weight"]
    config.apply_vllm_mapper(
        WeightsMapper(orig_to_new_prefix={"lm_head.": "language_model.lm_head.", "model.": "language_model.model."})
    )
    assert list(config.sizes) == ["language_model.lm_head", "language_model.model.embed_tokens"]
    ParallelLMHead(VOCABULARY, HIDDEN, quant_config=config, prefix="language_model.lm_head")
    embedding = VocabParallelEmbedding(VOCABULARY, HIDDEN, quant_config=config)  # as Llama's, which vLLM gives no name
    mapper = config.get_checkpoint_weight_mapper()
    assert mapper.map_name("lm_head.weight") is None
    assert mapper.map_name("model.norm.weight") == "model.norm.weight"
    loaded = load(embedding, {None: "model.embed_tokens"})
    assert torch.equal(loaded(torch.tensor([69])), PLANES["model.embed_tokens"].dense()[[69]])


def test_unnamed_embedding_may_be_dense(alone):
    config = make_config("lm_head")  # of the same size
    embedding = VocabParallelEmbedding(VOCABULARY, HIDDEN, quant_config=config)
    weight = inputs(VOCABULARY, HIDDEN)
    embedding.weight.weight_loader(embedding.weight, weight)
    embedding.quant_method.process_weights_after_loading(embedding)
    assert torch.equal(embedding(torch.tensor([3])), weight[[3]])


def test_tied_head_becomes_the_embedding(alone):
    config = make_config("model.embed_tokens", tied_head=True)
    embedding = load(
        VocabParallelEmbedding(VOCABULARY, HIDDEN, quant_config=config, prefix="model.embed_tokens"),
        {None: "model.embed_tokens"},
    )
    head = ParallelLMHead(VOCABULARY, HIDDEN, quant_config=config, prefix="lm_head")
    with pytest.raises(RuntimeError, match="`lm_head` uses the packed embedding"):
        head.quant_method.apply(head, inputs(1, HIDDEN))
    head = head.tie_weights(embedding)
    logits = head.quant_method.apply(head, inputs(1, HIDDEN))[:, :VOCABULARY]
    expected = inputs(1, HIDDEN) @ PLANES["model.embed_tokens"].dense().T
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-3)


def test_part_that_stayed_dense(alone):
    config = make_config("model.attn.q_proj", "model.attn.v_proj")
    layer = QKVParallelLinear(
        HIDDEN, 8, 4, 2, prefix="model.attn.qkv_proj", quant_config=config, return_bias=False, bias=False
    )
    assert type(layer.quant_method) is SABLinearMethod
    k = inputs(16, HIDDEN)
    layer.weight.weight_loader(layer.weight, k, "k")
    load(layer, {"q": "model.attn.q_proj", "v": "model.attn.v_proj"})
    x, W = inputs(3, HIDDEN), [PLANES["model.attn.q_proj"].dense(), k, PLANES["model.attn.v_proj"].dense()]
    assert torch.allclose(layer(x), x @ torch.cat(W).T, rtol=1e-4, atol=1e-3)


def test_experts_of_a_file_that_has_them_one_by_one(alone):
    """Gate and up apart, as vLLM's Mixtral renames them, and second matrices that stayed dense as one parameter."""
    names = [f"model.mlp.experts.{number}.{matrix}" for number in range(3) for matrix in ("w1", "w3")]
    config = make_config()
    config.sizes = dict.fromkeys(names, PackedSize(INNER, HIDDEN, 1, 0))
    down = {number: inputs(HIDDEN, INNER, seed=20 + number) for number in range(3)}
    tensors = {"down_proj": torch.stack(list(down.values()))}
    for name, tensor in expert_tensors().items():
        _, matrix, number, part = name.split(".")
        if matrix == "gate_up_proj":
            axis = ROW_AXIS.get(part)
            halves = [tensor, tensor] if axis is None else tensor.chunk(2, axis)
            tensors |= {f"{number}.w1.{part}": halves[0], f"{number}.w3.{part}": halves[1]}
    layer = make_experts(quant_config=config, ckpt_names=("w1", "w2", "w3"))
    assert torch.allclose(run_experts(layer, tensors), expected_experts(down), rtol=1e-4, atol=1e-3)


def test_dense_experts_stay_vllms_own(alone):
    layer = make_experts()
    assert type(layer.quant_method) is SABExpertsMethod
    assert make_config("lm_head").get_quant_method(layer, "model.mlp.experts") is None


def test_experts_with_a_matrix_too_few_or_too_many_are_refused(alone):
    tensors = expert_tensors()
    layer = make_experts()
    with pytest.raises(ValueError, match=r"`model.mlp.experts` has no place for the tensor `split.gate_proj.0.bias`"):
        list(layer.load_weights([("split.gate_proj.0.bias", torch.zeros(2))]))
    few = {name: tensor for name, tensor in tensors.items() if not name.startswith("split.down_proj.1")}
    with pytest.raises(ValueError, match=r"`model.mlp.experts.1` must get a matrix for each of its 1 outputs"):
        run_experts(layer, few)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"activation": "swigluoai"}, "their activation is 'swigluoai'"), ({"has_bias": True}, "they have biases")],
)
def test_experts_that_do_something_else_are_refused(alone, changes, message):
    with pytest.raises(
        ValueError, match=f"the experts of `model.mlp.experts` are packed, and vLLM cannot run them: {message}"
    ):
        make_experts(**changes)


def test_packed_experts_need_eager_mode(alone, monkeypatch):
    monkeypatch.setattr(
        get_current_vllm_config(), "model_config", SimpleNamespace(enforce_eager=False, dtype=torch.float32)
    )
    with pytest.raises(ValueError, match="no graph can hold that; add --enforce-eager"):
        make_experts()


def test_checkpoint_of_the_hub_is_checked_and_its_head_tied(packed_dir, monkeypatch):
    asked = []

    def download(name, **where):
        asked.append((name, where))
        return str(packed_dir)

    monkeypatch.setattr("sab_hf.vllm.config.snapshot_download", download)
    method = json.loads((packed_dir / "config.json").read_text())["quantization_config"]
    config, hf_config = SABConfig.from_config(method), AutoConfig.from_pretrained(packed_dir)
    config.maybe_update_config("me/tiny", hf_config, revision="v2")
    assert asked == [("me/tiny", {"revision": "v2", "allow_patterns": ["*.json", "*.safetensors"]})]
    assert len(config.sizes) == len(method["modules"])
    assert not hf_config.get_text_config().tie_word_embeddings
    config.config.tied_head = True
    config.maybe_update_config("me/tiny", hf_config)
    assert hf_config.tie_word_embeddings
    assert hf_config.get_text_config().tie_word_embeddings


# ---- what vLLM says before anything is loaded


def refused(folder: Path, **arguments) -> str:
    """Return the error with which vLLM refuses a checkpoint, before there is a model."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the caller looks at it)
        EngineArgs(model=str(folder), dtype="float32", max_model_len=128, **arguments).create_engine_config()
    return str(error.value)


def copied(packed_dir: Path, tmp_path: Path, change) -> Path:
    """Return a copy of a checkpoint whose quantization config is changed."""
    folder = tmp_path / "copy"
    shutil.copytree(packed_dir, folder)
    content = json.loads((folder / "config.json").read_text())
    change(content["quantization_config"])
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_good_checkpoint_is_accepted(packed_dir):
    config = EngineArgs(model=str(packed_dir), dtype="float32", max_model_len=128).create_engine_config()
    assert config.quant_config.get_name() == "sab"
    assert len(config.quant_config.sizes) == len(config.quant_config.config.modules)


def test_format_of_the_future_is_refused(packed_dir, tmp_path):
    folder = copied(packed_dir, tmp_path, lambda config: config.update(format_version=2, something_new=1))
    assert "format version 2, this sab_hf reads version 1; upgrade sab_hf" in refused(folder)


def test_altered_config_and_tensors_are_refused(packed_dir, tmp_path):
    folder = copied(packed_dir, tmp_path, lambda config: config.update(tied_head=True))
    assert "config.json was altered after it was saved" in refused(folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("norm.weight"))  # a dense one
    tensors[name][0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(packed_dir / "config.json", folder)
    assert "were altered, lost or added after it was saved" in refused(folder)


def test_untested_vllm_is_refused(packed_dir, monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.40.1")
    assert "need vLLM 0.32 or newer and older than 0.33, got 0.40.1" in refused(packed_dir)


def test_sizes_that_do_not_divide_are_refused(packed_dir):
    assert "must be divisible by tensor parallel size" in refused(packed_dir, tensor_parallel_size=3)
