"""A portable checkpoint as a GGUF file, for llama.cpp and what is built on it.

The planes of a model that was made with `portable="gguf"` have row scales alone, and Q1_0 holds them as they are: each group of
128 weights has its row's scale, and the sign bits lie in the order of `packing.py`. So the file is the model; nothing is
quantized again but embedding and output head.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils import cached_file

from ..anatomy.llama_cpp import GROUP, Architecture, architecture_of
from ..anatomy.roles import EMBEDDING, HEAD, LANGUAGE, Roles, find_roles
from ..packed.linear import SABLinear, SABModule
from ..paths import check_new_file
from ..version import __version__
from .gguf_header import add_sizes, add_tokenizer
from .gguf_mmproj import add_tower_header, image_statistics, require_tower, tower_tensors
from .locate import read_config, require_packed
from .open import opening_class

logger = logging.getLogger(__name__)

EMBEDDING_TYPES = ("q8_0", "q4_0", "f16")
MADE_BY = "sab_hf.version"
"""Key of the metadata that says which version of this package wrote the file."""

_GROUP_BYTES = 2 + GROUP // 8
_ONE = int(torch.tensor(1.0, dtype=torch.float16).view(torch.int16))
_LEAST_AGREEMENT = 0.55
"""Share of signs that binarized weights must have in common with the weights of the same model; chance gives a half."""
_COMPARED_ROWS = 64


@dataclass(frozen=True)
class GGUFExport:
    """What was written.

    Attributes:
        path: of the file.
        num_bytes: its size.
        bytes_by_type: type of tensors → bytes of them.
        has_tower: whether the model has a vision tower, which is not in this file.
        mmproj: path of the file with the vision tower; None if none was written.
    """

    path: str
    num_bytes: int
    bytes_by_type: dict[str, int]
    has_tower: bool = False
    mmproj: str | None = None

    def __str__(self) -> str:
        parts = ", ".join(f"{2**-20 * size:.1f} MiB {kind}" for kind, size in self.bytes_by_type.items())
        lines = [f"saved: {self.path}, {2**-20 * self.num_bytes:.1f} MiB ({parts})"]
        if self.mmproj:
            lines.append(
                f"saved: {self.mmproj}, vision tower and projector: `--mmproj` of llama-server and llama-mtmd-cli"
            )
        elif self.has_tower:
            lines.append(
                "it reads text alone: pictures need an `mmproj` file, that of the original model, or one of --mmproj"
            )
        return "\n".join(lines)


def export_gguf(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    *,
    like: str | os.PathLike | None = None,
    embedding: str = "q8_0",
    mmproj: str | os.PathLike | None = None,
) -> GGUFExport:
    """Write the language model of a portable checkpoint as a GGUF file, and its vision tower as another one.

    Args:
        checkpoint: folder or Hub id of a checkpoint that was quantized with `portable="gguf"`.
        output: the file; nothing may be there.
        like: an F16, BF16 or F32 GGUF file of the same model: tokenizer, chat template and metadata are taken from it. None: they
            are written anew.
        embedding: type of input embedding and output head: "q8_0", "q4_0" or "f16".
        mmproj: file for vision tower and projector, in float16, of a Gemma 3 or Qwen2.5-VL; nothing may be there. None: they are
            not written, as the file of the original model goes with this one.
    Raises:
        ValueError: the checkpoint is not portable, its kind of model, tower or tokenizer cannot be written, `like` is of another
            model, or something is where a file shall be.
        ImportError: the package `gguf` is missing.
        OSError: there is no such checkpoint, or the file cannot be written.
    """
    gguf = _package()
    if embedding not in EMBEDDING_TYPES:
        raise ValueError(f"`embedding` must be one of {list(EMBEDDING_TYPES)}, got {embedding!r}")
    output = Path(output).absolute()
    beside = None if mmproj is None else Path(mmproj).absolute()
    outputs = [path for path in (output, beside) if path]
    for path in outputs:
        check_new_file(path)
    if beside == output:
        raise ValueError(
            f"the language model and `mmproj` are two files, and both shall be `{output}`; choose another name"
        )
    source = None if like is None else _Source(Path(like))
    packed = read_config(checkpoint)
    require_packed(packed, checkpoint)
    tokenizer = None if source else _tokenizer(checkpoint)
    if beside:
        require_tower(packed)
        statistics = image_statistics(checkpoint)
    model = opening_class(packed).from_pretrained(checkpoint, dtype="auto", device_map="cpu")
    roles, config = find_roles(model), model.config.get_text_config()
    architecture = architecture_of(config)
    _check_portable(model, roles, str(checkpoint))
    tensors = dict(_tensors(model, roles, config, architecture, embedding))
    with _new_files(*outputs) as partials:
        partial = partials[0]
        writer = gguf.GGUFWriter(partial, architecture.name)
        if source is None:
            _add_header(writer, model, roles, config, tokenizer, _name_of(checkpoint))
        else:
            source.check(tensors, architecture, str(checkpoint))
            source.copy_header(writer)
            tensors = source.complete(tensors, embedding)
        writer.add_quantized_by("sab_hf")
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q1_0)
        _finish(writer, tensors)
        size = partial.stat().st_size
        if beside:
            writer = gguf.GGUFWriter(partials[1], "clip")
            add_tower_header(writer, model.config, statistics)
            writer.add_name(_name_of(checkpoint))
            _finish(writer, {name: _dense(value, kind) for name, value, kind in tower_tensors(model)})
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.kind.name] += tensor.data.nbytes
    has_tower = bool(roles.vision)
    return GGUFExport(str(output), size, dict(sizes.most_common()), has_tower, None if beside is None else str(beside))


def _finish(writer: Any, tensors: dict[str, _Tensor]) -> None:
    """Write a file whose header is complete but for who made it."""
    writer.add_string(MADE_BY, __version__)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.data, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- tensors


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file: its bytes, their type, and of planes the signs of some rows, to compare.

    Attributes:
        data: as the writer takes it; of quantized types uint8 [rows, bytes].
        kind: a `gguf.GGMLQuantizationType`.
        dense: float32, the first rows of the weight that it stands for.
    """

    data: np.ndarray
    kind: Any
    dense: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        import gguf

        quantized = self.data.dtype == np.uint8
        return gguf.quant_shape_from_byte_shape(self.data.shape, self.kind) if quantized else self.data.shape


def q1_0(signs: Tensor, row_scale: Tensor) -> np.ndarray:
    """Return one plane in GGUF's Q1_0: for each 128 weights of a row a float16 scale, then the sign bits.

    Args:
        signs: [out_features, in_features / 8] uint8, as stored.
        row_scale: [out_features] float16. A negative one turns the signs; where it is zero they are all positive, as ggml writes
            them.
    Returns:
        [out_features, in_features / 128 · 18] uint8.
    """
    signs = torch.where(row_scale[:, None] < 0, ~signs, signs)
    signs = torch.where(row_scale[:, None] == 0, torch.full_like(signs, 255), signs)
    bits = signs.unflatten(1, (-1, GROUP // 8))
    scale = row_scale.abs().contiguous().view(torch.uint8).unflatten(0, (-1, 2))
    groups = torch.cat([scale[:, None].expand(-1, bits.shape[1], -1), bits], -1)
    return groups.flatten(1).numpy()


def _tensors(
    model: nn.Module, roles: Roles, config: Any, architecture: Architecture, embedding: str
) -> Iterator[tuple[str, _Tensor]]:
    """Yield the tensors of the text model and the output head by their names in the file."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    text = roles.embedding.rpartition(".")[0]
    head = model.get_output_embeddings()
    tied = head is None or head.weight is model.get_input_embeddings().weight
    for name, module in model.named_modules():
        role = roles.of(name)
        if role not in (LANGUAGE, EMBEDDING, HEAD) or (role == HEAD and tied):
            continue
        known = "lm_head" if role == HEAD else f"model.{name[len(text) :].lstrip('.')}"
        parameters = [("weight", module.weight)] if isinstance(module, SABModule) else []
        parameters += [(key, p) for key, p in module.named_parameters(recurse=False) if key in ("weight", "bias")]
        for key, parameter in parameters:
            if isinstance(module, SABModule) and key == "weight" and not isinstance(module, SABLinear):
                continue
            stem = names.get_name(known)
            if stem is None:
                raise ValueError(f"llama.cpp's {architecture.name!r} has no place for the tensor `{name}.{key}`")
            rows = None
            if architecture.rotated and name.endswith(("q_proj", "k_proj")):
                heads = config.num_attention_heads if name.endswith("q_proj") else config.num_key_value_heads
                rows = torch.arange(parameter.shape[0]).view(heads, 2, -1).transpose(1, 2).flatten()
            if isinstance(module, SABLinear) and key == "weight":
                yield f"{stem}.weight", _planes(module, rows)
                continue
            value = parameter.detach().float()
            value = value if rows is None else value[rows]
            if value.ndim == 1:
                offset = architecture.gain_offset if key == "weight" else 0.0
                yield f"{stem}.{key}", _dense(value + offset, kinds.F32)
            else:
                kind = kinds.F16 if role == LANGUAGE else kinds[embedding.upper()]
                yield f"{stem}.{key}", _dense(value, kind)


def _planes(module: SABLinear, rows: Tensor | None) -> _Tensor:
    import gguf

    signs, row_scale = module.signs.detach()[0].cpu(), module.row_scale.detach()[0].cpu().view(torch.float16)
    if rows is not None:
        signs, row_scale = signs[rows], row_scale[rows]
    some = slice(_COMPARED_ROWS)
    values = np.unpackbits(signs[some].numpy(), axis=1, bitorder="little").astype(np.float32) * 2 - 1
    dense = values * row_scale[some, None].float().numpy()
    return _Tensor(q1_0(signs, row_scale), gguf.GGMLQuantizationType.Q1_0, dense)


def _dense(value: Tensor | np.ndarray, kind: Any) -> _Tensor:
    import gguf

    value = np.ascontiguousarray(value.cpu().numpy() if isinstance(value, Tensor) else value, dtype=np.float32)
    some = value[:_COMPARED_ROWS].copy() if value.ndim > 1 else value  # a view would keep all rows in memory
    if kind == gguf.GGMLQuantizationType.F16 and np.abs(value).max(initial=0) > np.finfo(np.float16).max:
        raise ValueError("a weight is too large for float16; the checkpoint is damaged, or choose another `embedding`")
    return _Tensor(gguf.quants.quantize(value, kind), kind, some)


def _check_portable(model: nn.Module, roles: Roles, checkpoint: str) -> None:
    """Raise a ValueError unless Q1_0 can hold every packed matrix of the text model."""
    for name, module in model.named_modules():
        if not isinstance(module, SABModule) or roles.of(name) not in (LANGUAGE, EMBEDDING, HEAD):
            continue
        problem = None
        if roles.of(name) != LANGUAGE:
            problem = "is packed, and embedding and head must be dense"
        elif module.num_planes > 1 or module.num_significant:
            problem = f"has {module.num_planes} planes and {module.num_significant} significant columns"
        elif not bool((module.col_scale == _ONE).all()):
            problem = "has column scales"
        elif module.in_features % GROUP:
            problem = f"has rows of {module.in_features} weights, no multiple of {GROUP}"
        if problem:
            raise ValueError(
                f"`{checkpoint}` is not portable: `{name}` {problem}, which llama.cpp's Q1_0 cannot hold; quantize the dense "
                'model with `SABQuantizationConfig(portable="gguf")` (`sab-hf quantize --set portable=gguf`)'
            )


# ---- header


def _tokenizer(checkpoint: str | os.PathLike) -> Any:
    try:
        cached_file(
            checkpoint, "tokenizer.json"
        )  # without files, transformers 5 makes some families an empty tokenizer
        return AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise OSError(
            f"`{checkpoint}` has no tokenizer beside its weights ({error}); save one there: "
            f"`AutoTokenizer.from_pretrained(<base model>).save_pretrained({str(checkpoint)!r})`, or pass `like` (--like) with "
            "an F16 GGUF file of the same model"
        ) from error


def _add_header(writer: Any, model: nn.Module, roles: Roles, config: Any, tokenizer: Any, name: str) -> None:
    writer.add_type("model")
    writer.add_name(name)
    text = model.get_submodule(roles.embedding.rpartition(".")[0])
    add_sizes(writer, config, text.rotary_emb)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        add_tokenizer(writer, Path(folder), model.get_input_embeddings().weight.shape[0])


def _name_of(checkpoint: str | os.PathLike) -> str:
    return Path(checkpoint).resolve().name if Path(checkpoint).exists() else str(checkpoint).rpartition("/")[2]


class _Source:
    """An existing GGUF file of the same model, whose header and other tensors are taken.

    Args:
        path: of the file.
    Raises:
        ValueError: it is no GGUF file, or one part of several.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path):
        import gguf

        if not path.is_file():
            raise FileNotFoundError(f"there is no file `{path}` to take tokenizer and metadata from")
        self.path = path
        try:
            self.reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError) as error:
            raise ValueError(f"`{path}` is no complete GGUF file ({error}); download or make it again") from error
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        if (self._field("split.count") or 1) > 1:
            raise ValueError(f"`{path}` is one part of several; join them with `llama-gguf-split --merge`")

    def _field(self, name: str) -> Any:
        found = self.reader.get_field(name)
        return None if found is None else found.contents()

    def _values(self, name: str, rows: int) -> np.ndarray:
        """Return the first rows of a tensor as float32."""
        import gguf

        tensor = self.tensors[name]
        return gguf.quants.dequantize(tensor.data[:rows], tensor.tensor_type)

    def check(self, tensors: dict[str, _Tensor], architecture: Architecture, checkpoint: str) -> None:
        """Raise a ValueError unless the file holds the model that the tensors were made from, in floating point."""
        import gguf

        kinds = gguf.GGMLQuantizationType
        found = self._field("general.architecture")
        if found != architecture.name:
            raise self._of_another(checkpoint, f"its architecture is {found!r}, {architecture.name!r} is required")
        blocks = {name.split(".")[1] for name in self.tensors if name.startswith("blk.")}
        own = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
        if len(blocks) != len(own):
            raise self._of_another(checkpoint, f"it has {len(blocks)} blocks, {len(own)} are required")
        of_blocks = {name for name in self.tensors if name.startswith("blk.")}
        missing, unknown = sorted(tensors.keys() - self.tensors.keys()), sorted(of_blocks - tensors.keys())
        if missing or unknown:
            name, what = (missing[0], "lacks") if missing else (unknown[0], "has")
            raise self._of_another(checkpoint, f"it {what} the tensor `{name}`")
        for name, tensor in tensors.items():
            there = self.tensors[name]
            shape = tuple(int(size) for size in reversed(there.shape))
            if shape != tuple(tensor.shape):
                raise self._of_another(checkpoint, f"its `{name}` is {list(shape)}, {list(tensor.shape)} is required")
            if there.tensor_type not in (kinds.F16, kinds.BF16, kinds.F32):
                raise ValueError(
                    f"`{self.path}` must be an F16, BF16 or F32 file, and its `{name}` is {there.tensor_type.name}: it is "
                    "quantized already; take the F16 file of the same model"
                )
        for name, tensor in tensors.items():
            self._check_values(name, tensor, checkpoint)

    def _of_another(self, checkpoint: str, what: str) -> ValueError:
        return ValueError(
            f"`{self.path}` is not of the model of `{checkpoint}`: {what}; pass an F16 file of the model that was quantized, or "
            "leave `like` out"
        )

    def _check_values(self, name: str, tensor: _Tensor, checkpoint: str) -> None:
        """Hold what binarizing keeps against the file: signs of planes, and embedding, head and last norm as they are."""
        import gguf

        if tensor.kind == gguf.GGMLQuantizationType.Q1_0:
            values = self._values(name, len(tensor.dense))
            same = float(((values >= 0) == (tensor.dense >= 0)).mean())
            if same < _LEAST_AGREEMENT:
                share = f"{100 * same:.0f} % of the signs of `{name}` are the same, and by chance half of them are"
                raise self._of_another(checkpoint, share)
        elif not name.startswith("blk."):
            values = self._values(name, len(tensor.dense))
            error, size = np.abs(values - tensor.dense).max(), np.abs(tensor.dense).max()
            if not error <= 1e-2 * size:
                raise self._of_another(checkpoint, f"the values of `{name}` differ")

    def copy_header(self, writer: Any) -> None:
        """Add all metadata of the file that do not tell how it was quantized."""
        import gguf

        own = (
            "general.architecture",
            "general.file_type",
            "general.quantization_version",
            "general.quantized_by",
            MADE_BY,
        )
        for field in self.reader.fields.values():
            if field.name in own or field.name.startswith(("GGUF.", "split.")) or not len(field.data):
                continue
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)

    def complete(self, tensors: dict[str, _Tensor], embedding: str) -> dict[str, _Tensor]:
        """Return all tensors in the order of the file: those given, and the file's own where there are none."""
        import gguf

        found = {}
        for name, there in self.tensors.items():
            if name in tensors:
                found[name] = tensors[name]
            elif name == "output.weight":  # a head of its own that transformers ties
                values = gguf.quants.dequantize(there.data, there.tensor_type)
                found[name] = _dense(values, gguf.GGMLQuantizationType[embedding.upper()])
            else:
                found[name] = _Tensor(there.data, there.tensor_type, np.empty(0))
        return found


# ---- files


def _package() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise ImportError('GGUF files need the package `gguf`: `pip install "sab_hf[gguf]"`') from error
    if not hasattr(gguf.GGMLQuantizationType, "Q1_0"):
        raise ImportError("the package `gguf` is too old to know one-bit weights; 0.19 or newer is required")
    return gguf


@contextmanager
def _new_files(*outputs: Path) -> Iterator[list[Path]]:
    """Give names of hidden files beside `outputs` that become them in the end, all or none; on an error they are removed."""
    partials: list[Path] = []
    try:
        for output in outputs:
            descriptor, name = tempfile.mkstemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent)
            os.close(descriptor)
            partials.append(Path(name))
        yield partials
        mask = os.umask(0)
        os.umask(mask)
        for output, partial in zip(outputs, partials, strict=True):
            partial.chmod(0o666 & ~mask)
            check_new_file(output)
        for output, partial in zip(outputs, partials, strict=True):
            partial.rename(output)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
