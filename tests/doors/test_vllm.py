"""Packed checkpoints for vLLM without vLLM: cutting for ranks, collecting the tensors of a layer, checking a folder."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import inputs, random_planes, sizes
from hypothesis import given
from hypothesis import strategies as st
from processes import FORK, begin_forked
from safetensors.torch import load_file, save_file
from torch import nn

import sab_hf.vllm
from sab_hf import SABLinear, SABQuantizationConfig
from sab_hf.packed.verify import packed_sizes, read_entries
from sab_hf.packing import pack_bits, to_tensors
from sab_hf.planes import SignPlanes
from sab_hf.vllm.checkpoint import check_checkpoint
from sab_hf.vllm.parts import Parts, Share, multiply
from sab_hf.vllm.shards import cut_bits
from sab_hf.vllm.versions import ANY_VERSION, check_version

CPU = torch.device("cpu")


def collect(share: Share, matrices: dict, embedding: bool = False, reverse: bool = False) -> list[nn.Module]:
    """Hand matrices (planes, or dense weights) over as a loader does, which reuses the memory; outputs → matrix."""
    parts = Parts(share, torch.float32, embedding)
    arriving = []
    for outputs, matrix in matrices.items():
        tensors = to_tensors(matrix) if isinstance(matrix, SignPlanes) else {"weight": matrix}
        arriving += [(name, tensor.clone(), outputs) for name, tensor in tensors.items()]
    for name, tensor, outputs in reversed(arriving) if reverse else arriving:
        parts.add(name, tensor, outputs, CPU)
        tensor.zero_()
    return parts.modules()


def dense(modules: list[nn.Module]) -> torch.Tensor:
    """Return the matrix that modules stand for together."""
    return torch.cat([m.weight if isinstance(m, nn.Linear) else m.planes().dense() for m in modules])


def linear_share(planes: SignPlanes, rank: int = 0, ranks: int = 1, rows: bool = False) -> Share:
    """Return the share of a rank in one matrix, cut by columns, or by rows."""
    n, m = planes.shape
    if rows:
        return Share("proj", m, (0, m), [n // ranks], [n], rank, ranks)
    return Share("proj", m, (rank * m // ranks, (rank + 1) * m // ranks), [n], [n], rank, ranks)


@given(st.lists(st.booleans(), min_size=1, max_size=70), st.data())
def test_cut_bits_gives_the_bits_between(bits, data):
    start = data.draw(st.integers(0, len(bits)))
    stop = data.draw(st.integers(start, len(bits)))
    packed = pack_bits(torch.tensor([bits, bits[::-1]]))
    expected = pack_bits(torch.tensor([bits[start:stop], bits[::-1][start:stop]], dtype=torch.bool).reshape(2, -1))
    assert torch.equal(cut_bits(packed, start, stop), expected)


@given(sizes(), st.integers(1, 5), st.booleans())
def test_columns_of_the_ranks_make_the_matrix(size, ranks, reverse):
    """Ranks whose columns begin inside of bytes, with all, some or none of the significant columns."""
    planes = random_planes(*size)
    W = planes.dense()
    for rank in range(min(ranks, planes.shape[1])):
        share = linear_share(planes, rank, min(ranks, planes.shape[1]))
        modules = collect(share, {(0,): planes}, reverse=reverse)
        assert torch.equal(dense(modules), W[:, slice(*share.columns)])
        assert all(module.signs.is_contiguous() for module in modules)


@given(sizes(), st.integers(1, 4))
def test_rows_of_the_ranks_make_the_matrix(size, ranks):
    planes = random_planes(size[0] * ranks, *size[1:])
    own = [dense(collect(linear_share(planes, rank, ranks, rows=True), {(0,): planes})) for rank in range(ranks)]
    assert torch.equal(torch.cat(own), planes.dense())


def attention(rank: int, ranks: int) -> tuple[Share, list[SignPlanes]]:
    """Return the share of a rank in q, k and v of 4 heads and 2 of keys, of 8 rows each, and the three matrices."""
    heads, kv_heads = 4 // ranks, max(1, 2 // ranks)
    share = Share("qkv", 20, (0, 20), [8 * heads, 8 * kv_heads, 8 * kv_heads], [32, 16, 16], rank, ranks)
    q, k, v = random_planes(32, 20, 1, 3), random_planes(16, 20, 2, 0, seed=1), random_planes(16, 20, 1, 7, seed=2)
    return share, [q, k, v]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_fused_layer_keeps_parts_of_different_planes(ranks):
    """Four ranks share two heads of keys: two ranks have the same one."""
    for rank in range(ranks):
        share, parts = attention(rank, ranks)
        modules = collect(share, {(i,): planes for i, planes in enumerate(parts)}, reverse=True)
        kv = rank * 2 // ranks if ranks == 4 else rank
        starts = [rank * share.rows[0], kv * share.rows[1], kv * share.rows[2]]
        W = torch.cat([p.dense()[at : at + rows] for p, at, rows in zip(parts, starts, share.rows, strict=True)])
        assert torch.equal(dense(modules), W)
        x = inputs(5, 20)
        assert torch.allclose(multiply(modules, x, True), x @ W.T, atol=1e-4)


def test_matrix_that_the_file_holds_fused_is_cut_within_its_outputs():
    planes = random_planes(64, 20, 1, 5)
    for rank in range(2):
        share, _ = attention(rank, 2)
        q, k, v = planes.dense().split([32, 16, 16])
        W = torch.cat([part.chunk(2)[rank] for part in (q, k, v)])
        assert torch.equal(dense(collect(share, {None: planes})), W)
        two = collect(share, {(0, 1): random_planes(48, 20), (2,): random_planes(16, 20)})
        assert [module.out_features for module in two] == [24, 8]


def test_part_that_stayed_dense_stays_dense():
    share, (q, _, v) = attention(0, 1)
    k = inputs(16, 20, seed=5)
    modules = collect(share, {(0,): q, (1,): k, (2,): v})
    assert [type(module) for module in modules] == [SABLinear, nn.Linear, SABLinear]
    x, W = inputs(3, 20), torch.cat([q.dense(), k, v.dense()])
    assert torch.allclose(multiply(modules, x, True), x @ W.T, atol=1e-4)
    only = Share("proj", 20, (8, 16), [16], [16], 1, 2)
    assert torch.equal(dense(collect(only, {(0,): k})), k[:, 8:16])


def test_vocabulary_is_filled_up_with_zeros():
    planes = random_planes(50, 12, 2)
    for rank, span in enumerate(((0, 32), (32, 50))):
        share = Share("embed_tokens", 12, (0, 12), [32], [50], rank, 2, span)
        (head,) = collect(share, {(0,): planes})
        assert torch.equal(head.planes().dense()[: span[1] - span[0]], planes.dense()[slice(*span)])
        assert not head.planes().dense()[span[1] - span[0] :].any()
        (embedding,) = collect(share, {(0,): planes}, embedding=True)
        assert torch.equal(embedding(torch.tensor([3, 0])), planes.dense()[[span[0] + 3, span[0]]])
    with pytest.raises(ValueError, match="must have 50 rows, 32 on each of 2 ranks, the checkpoint has 51"):
        collect(share, {(0,): random_planes(51, 12)})


def test_products_of_a_layer_compile_without_a_break():
    share, parts = attention(0, 1)
    modules = nn.ModuleList(collect(share, {(i,): planes for i, planes in enumerate(parts)}))
    single = nn.ModuleList(collect(linear_share(parts[0]), {(0,): parts[0]}))

    def layer(x):
        return multiply(modules, x, True), multiply(single, x, True)

    x = inputs(4, 20)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert all(torch.equal(got, want) for got, want in zip(compiled(x), layer(x), strict=True))


def _layers_of_rank(rank: int, folder: Path) -> None:
    """Two layers of an MLP on one of two processes: the first cut by rows, the second by columns, results added up."""
    begin_forked()
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    up, down = _mlp()
    first = collect(linear_share(up, rank, 2, rows=True), {(0,): up})
    second = collect(linear_share(down, rank, 2), {(0,): down})
    y = multiply(second, multiply(first, inputs(5, 20), True).relu(), True)
    dist.all_reduce(y)
    save_file({"y": y, "significant": torch.tensor(second[0].num_significant)}, folder / f"{rank}.safetensors")
    dist.destroy_process_group()


def _mlp() -> tuple[SignPlanes, SignPlanes]:
    """Return two matrices; the second has 36 columns, so that each of two ranks has 18, and significant ones at random."""
    return random_planes(36, 20, 1, 4), random_planes(24, 36, 2, 7, seed=3)


def test_two_processes_give_the_outputs_of_one(tmp_path):
    processes = [FORK.Process(target=_layers_of_rank, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    results = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    up, down = _mlp()
    expected = (inputs(5, 20) @ up.dense().T).relu() @ down.dense().T
    for result in results:
        assert torch.allclose(result["y"], expected, rtol=1e-4, atol=1e-4)
    counts = [int(result["significant"]) for result in results]
    assert sum(counts) == 7
    assert min(counts) > 0


# ---- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"col_scale": lambda t: t[:, :-1]}, "takes 20 features, and `col_scale` of the checkpoint is"),
        ({"signs": lambda t: t[0]}, "takes 20 features, and `signs`"),
        ({"row_scale": lambda t: t[:, :-1]}, "31"),
        ({"significant_columns": torch.zeros_like}, "mark 3 columns"),
        ({"residual_signs": None}, "residual_signs"),
        ({"row_scale": None}, "lacks packed tensors: 1 in all, first `proj.row_scale`"),
    ],
)
@pytest.mark.parametrize("rows", [True, False])
def test_tensors_that_do_not_fit_are_refused(change, message, rows):
    planes = random_planes(32, 20, 1, 3)
    parts = Parts(linear_share(planes, 0, 2, rows=rows), torch.float32)

    def load():
        for name, tensor in to_tensors(planes).items():
            if change.get(name, 0) is not None:
                parts.add(name, change[name](tensor) if name in change else tensor, (0,), CPU)
        parts.modules()

    with pytest.raises(ValueError, match=message):
        load()


def test_matrices_of_other_sizes_are_refused():
    share = Share("proj", 20, (0, 20), [10], [30], 0, 3)
    for rows in (32, 10, 60):  # 10: what one rank has
        with pytest.raises(
            ValueError, match=f"`proj` must have 30 rows, 10 on each of 3 ranks, the checkpoint has {rows}"
        ):
            collect(share, {(0,): random_planes(rows, 20)})
    with pytest.raises(ValueError, match=r"must have 32 \+ 16 \+ 16 rows, 16 \+ 8 \+ 8 on each of 2 ranks, .* has 66"):
        collect(attention(0, 2)[0], {None: random_planes(66, 20)})
    with pytest.raises(ValueError, match="must have 30 rows, 20 on each of 3 ranks"):
        collect(Share("proj", 20, (0, 20), [20], [30], 0, 3), {(0,): random_planes(30, 20)})


def test_outputs_without_a_matrix_are_refused():
    share, parts = attention(0, 1)
    with pytest.raises(ValueError, match=r"`qkv` must get a matrix for each of its 3 outputs, got those of \[0, 2\]"):
        collect(share, {(0,): parts[0], (2,): parts[2]})
    with pytest.raises(ValueError, match=r"got those of \[0, 0, 1, 2\]"):
        collect(share, {None: random_planes(64, 20), (0,): parts[0]})
    with pytest.raises(ValueError, match="load format `dummy`"):
        Parts(share, torch.float32).modules()


def test_empty_weight_is_no_weight():
    planes = random_planes(8, 8)
    parts = Parts(linear_share(planes), torch.float32)
    parts.add("weight", torch.empty(0, dtype=torch.uint8), None, CPU)
    for name, tensor in to_tensors(planes).items():
        parts.add(name, tensor, None, CPU)
    assert isinstance(parts.modules()[0], SABLinear)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0", "0.4.1+cpu"])
def test_untested_versions_are_refused(version, monkeypatch):
    with pytest.raises(ValueError, match=rf"older than 0\.33, got {version[:3]}.*pip install.*{ANY_VERSION}=1"):
        check_version(version)
    monkeypatch.setenv(ANY_VERSION, "1")
    check_version(version)


def test_tested_versions_pass():
    for version in ("0.32.0", "0.32.5.dev3+cpu"):
        check_version(version)


def test_registering_in_an_unknown_vllm_leaves_a_word_in_the_log(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", None)  # an import of it fails
    monkeypatch.delitem(sys.modules, "sab_hf.vllm.config", raising=False)
    monkeypatch.delattr(sab_hf.vllm, "config", raising=False)
    sab_hf.vllm.register()
    assert "packed checkpoints of sab_hf will not load in this vLLM" in caplog.text


# ---- checkpoints


def config_of(folder: Path) -> SABQuantizationConfig:
    return SABQuantizationConfig.from_dict(json.loads((folder / "config.json").read_text())["quantization_config"])


def test_checkpoint_passes_and_tells_its_modules(packed_dir):
    sizes, markers = check_checkpoint(packed_dir, config_of(packed_dir))
    listed = config_of(packed_dir).modules
    assert sorted([size.num_planes, size.num_significant] for size in sizes.values()) == sorted(listed.values())
    tensors = load_file(packed_dir / "model.safetensors")
    assert markers == [name for name, tensor in tensors.items() if not tensor.numel()]
    assert len(markers) == 1
    for name, size in sizes.items():
        assert tensors[f"{name}.signs"].shape[:2] == (size.num_planes, size.out_features)
        assert tensors[f"{name}.col_scale"].shape[1] == size.in_features


def test_altered_tensor_is_found_before_anything_is_loaded(packed_dir, tmp_path):
    folder = tmp_path / "altered"
    shutil.copytree(packed_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".signs"))
    tensors[name][0, 0, 0] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="altered, lost or added"):
        check_checkpoint(folder, config_of(folder))


def _drop(tensors, ending):
    del tensors[next(name for name in tensors if name.endswith(ending))]


def _infinite(tensors):
    tensors[next(name for name in tensors if name.endswith(".row_scale"))][0, 0] = 0x7C00


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: _drop(tensors, ".row_scale"), "lacks packed tensors"),
        (lambda tensors: _drop(tensors, ".residual_signs"), "lacks packed tensors"),
        (_infinite, "not finite"),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1.mlp.down" in name],
            "the files hold",
        ),
        (lambda tensors: tensors.clear(), "the files hold 0"),
    ],
)
def test_damage_is_found_without_checksums(damage, change, message):
    folder = damage(tensors=change)
    with pytest.raises(ValueError, match=message):
        check_checkpoint(folder, config_of(folder))


def test_surplus_tensor_is_found(tmp_path):
    planes = random_planes(8, 8)
    tensors = {f"model.proj.{name}": tensor for name, tensor in to_tensors(planes).items()}
    extra = {"model.proj.residual_row_scale": torch.zeros(8, dtype=torch.int16)}
    save_file(tensors | extra, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not list: 1, first `model\.proj\.residual_row_scale`"):
        packed_sizes(read_entries([tmp_path / "model.safetensors"]))
    wrong = {"model.proj.signs": torch.zeros(1, 8, 2, dtype=torch.uint8)}
    save_file(tensors | wrong, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"`model\.proj\.signs` must be U8"):
        packed_sizes(read_entries([tmp_path / "model.safetensors"]))


def test_folder_without_weights_is_refused(packed_dir, tmp_path):
    shutil.copy(packed_dir / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="no safetensors files"):
        check_checkpoint(tmp_path, config_of(packed_dir))


def test_further_embeddings_on_the_packed_one_are_refused(packed_dir):
    config = config_of(packed_dir)
    config.tied_embeddings = ["model.decoder.embed_tokens"]
    with pytest.raises(ValueError, match=r"`model\.decoder\.embed_tokens` of this checkpoint uses the planes"):
        check_checkpoint(packed_dir, config)
