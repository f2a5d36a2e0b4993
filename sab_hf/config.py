"""`SABQuantizationConfig`: every number of the method, validated, with its unit and its reason."""

from __future__ import annotations

import copy
import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from .packing import FORMAT_VERSION
from .spelling import did_you_mean

MAX_PLANES = 8
"""Most full planes a matrix may have. The sign sweep compares 2^(planes + 1) levels for each weight."""

MAX_SEED, MAX_COUNT = 2**63 - 1, 2**31 - 1
"""Largest seed (some steps add the number of a sample to it, and generators take 64 bits), and largest number of anything."""

DENSE = 16
"""Bits of a role that is left as it is."""

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"num_samples": 128, "sensitivity_samples": 16, "refine_steps": 0, "distil_steps": 0},
    "balanced": {},
    "best": {"num_samples": 1024, "written_samples": 4096, "refine_steps": 100, "distil_steps": 4000},
}
"""What a preset means: the fields that it sets. Fast: the fit alone; 128 samples are enough for it, and 16 of them for the
sensitivity. Best: more samples, of which the model writes most, refined blocks and more steps; each of these lowers the loss
(benchmarks/ACCURACY.md)."""

_NOT_SERIALIZED = ("calibration", "processor", "progress")
_ONLY_FOR_THE_RUN = ("preset",)
"""Fields whose effect other fields hold afterwards."""
REST_ROLES = ("vision", "projector", "embedding", "head")
"""Roles outside the language blocks, see `anatomy/roles.py`."""
_CHOICES = {
    "fit": ("hessian", "elementwise"),
    "modality_balance": ("equal", "tokens", "text"),
    "significance": ("gradient", "paper", "none"),
    "budget": ("sensitivity", "uniform"),
    "refine_loss": ("balanced", "gradient"),
    "portable": (None, "gguf"),
}

_OF_THE_MACHINE = (
    "compute_device",
    "checkpoint_dir",
    "offload_dir",
    "cache_device_gib",
    "cache_ram_gib",
    "process_timeout",
    "allow_urls",
)
"""Fields about where a run happens, which no checkpoint records."""


@dataclass(repr=False)
class SABQuantizationConfig(QuantizationConfigMixin):
    """How to binarize a vision-language model; pass it to `from_pretrained(..., quantization_config=...)`.

    The fields to know first:

    Attributes:
        bits: stored bits per weight, averaged over the quantized language weights: signs, residual planes, scales and
            masks, everything. The result is at most this; `budget` says how the bits are distributed. None: what one plane and a
            residual plane on a tenth of the columns take in every matrix (the scales of a small matrix take more bits a
            weight, so no fixed number suits all models).
        preset: `"fast"`, `"balanced"` or `"best"`, a set of values for other fields (docs/time_and_memory.md); fields that are
            also given override it. None: the defaults, which are `"balanced"`. The resulting values are saved.
        calibration: `"builtin"` (drawn and written by the package, no network), a Hub dataset id, a local folder or
            JSONL file, a list of chat-message samples, or a list of processed batches. Only names are saved, of a path its
            last two parts.
        num_samples: calibration samples. 128, as in the published methods, are enough for the fit; training gains from
            more (docs/your_data.md).
        image_tokens: most tokens that a picture becomes in calibration, by fewer tiles or fewer pixels than the processor makes
            by itself; what the packed model runs on is not changed. None: at most three quarters of `max_length`, and on a CPU at
            most 256, or as near to that as the processor can.
        seed: seed of the order of the calibration set, and of the built-in one.
        max_length: most tokens of a sample; longer samples are dropped and counted, never truncated.
        batch_size: calibration samples per forward pass; 1 needs least memory and no padding.
        written_samples: samples that the model writes itself, continuing the given ones, beside them for distillation; 0: none.
            With a few hundred given samples they help; in place of given ones they do not. None: 2,048 after the built-in samples
            where an accelerator has room for the whole model twice, else none.
        allow_text_only: permit a calibration set without image tokens for a model that takes images.
        allow_urls: fetch files that calibration samples name by http(s) URL: each at most 64 MiB (video and audio 1 GiB) and
            60 s, from public addresses alone. False: such a sample is an error, since a data set may come from elsewhere.
        rest_bits: sign planes of every matrix outside the language blocks: vision (and audio) towers, projector, input embedding
            and output head, 1 to 8, as many bits a weight and a little for scales; 16 leaves them dense. 4 makes
            the whole checkpoint small, and costs a little accuracy (benchmarks/ACCURACY.md).
        vision_bits, projector_bits, embedding_bits, head_bits: the same for one of them; None: `rest_bits`. Tied embeddings
            are one matrix and are stored once.
        portable: `"gguf"` makes a model that llama.cpp and Ollama run after `sab-hf export gguf`: one plane with row scales
            alone, 1.125 bits there, and less accurate than as many bits of our own format. Rows must have a multiple of 128
            weights; `bits` and the bits of other parts are left out (docs/gguf.md). None: what transformers runs best.
        modules_to_not_convert: modules that stay dense: each entry is a module name, or a part of one between
            dots (`"layers.0"`, `"down_proj"`). An entry that matches nothing is an error.
        allow_low_coverage: permit that less than 90 % of the language weights are quantized.
        language_blocks: names of the lists of language blocks, for a model in which they are not found by structure.
        processor: the model's processor or tokenizer, or a path to it; None loads it from where the model came from.
        progress: a function that is called in place of the progress bar, some times a second, with where the run is: `share` of
            the work, `stage`, `seconds_left` and more (`sab_hf.machine.bar.Moment`). What it raises ends the run.

    The method:

    Attributes:
        fit: `"hessian"` minimizes the error of the layer's output (method §4); `"elementwise"` is the closed form of the
            paper's weighted objective, without second moments: far cheaper, far less accurate.
        modality_balance: how the second moments of the modalities are mixed: `"equal"` parts, by `"tokens"`, or `"text"` alone,
            as the published method does for its error feedback.
        significance: the sensitivity behind the significance map and the budget. `"gradient"` multiplies the paper's S by the
            squared gradient of the loss at each output feature, from one backward pass, so that ρ and Λ vary over rows as well;
            `"paper"` is the paper's S, constant down each column in its ρ and Λ; `"none"` sets Λ = 1.
        budget: `"sensitivity"` spends bits across all layers where they lower the loss most; `"uniform"` gives every matrix the
            same planes and the same share of significant columns.
        sensitivity_samples: calibration samples of the pass that measures gradients and column scores for these two.
        alternations: rounds of the alternating fit; the best round by objective is kept.
        damping: added to the diagonal of a second-moment matrix, as a share of its mean; 0.01 as in GPTQ. Below 1e-6, float32
            no longer inverts the matrix.
        refine_steps: steps of block refinement (method §5), which trains scales, signs, norms and biases of a block to give
            the full-precision block's output. None: 400 on a GPU, 50 on a CPU, but none for blocks that are distilled; 0 turns
            it off.
        refine_batch: calibration samples of one step.
        refine_loss: `"balanced"` squared error, modalities in equal parts; `"gradient"` weighs it by the squared gradient of the
            model's loss at each feature of the block's output, by modality.
        refine_scale_rate: Adam's learning rate for scales (relative to their size), norms and biases; 2e-3 to 1e-2 measured
            alike.
        refine_latent_rate: the same for the latent weights behind the signs, which start at ±0.5.
        distil_steps: steps of distillation (method §7), which trains scales, signs, norms and biases of all language blocks
            together to predict what the full-precision model predicts. None: 1000 on a GPU, 150 on a CPU; 0 turns it off.
        distil_batch: calibration samples of one step.
        distil_latent_rate: Adam's learning rate for the latent weights behind the signs. None: 0.04 / `bits`, at most 0.03,
            and times √(1000 / `distil_steps`) above 1000 steps.
        distil_scale_rate: the same for scales, norms and biases, relative to their size. None: a fifth of the former, at most
            0.005.
        block_size: columns that the sign sweep treats between two matrix products; changes speed, not results.
        salient_top_p: share of weights that count as significant in a modality (paper's value).
        diff_quantile: quantile of |S_text − S_visual| from which a significant weight is unimodal (paper's value).
        sparsity_threshold: least Hoyer sparsity ρ of a unimodal weight (paper's value).

    Big models (docs/big_models.md); none of these changes the result, and none is saved:

    Attributes:
        compute_device: where blocks are quantized, one at a time, such as `"cuda:0"`; None: where the model is if that is an
            accelerator, else the accelerator if there is one, else the CPU.
        checkpoint_dir: folder into which each finished block is committed, so that a killed run continues after it.
        offload_dir: folder for hidden states that do not fit into memory; None: the system's folder for temporary files.
        cache_device_gib, cache_ram_gib: hidden states kept on the compute device, and then in RAM, in GiB; what is beyond
            goes to `offload_dir`. None: a quarter of what is free there.
        process_timeout: seconds that one process of several waits for the others.

    Written by the package:

    Attributes:
        modules: quantized modules, name → [full planes, significant columns]; empty before quantization.
        tied_head: whether the output head uses the packed planes of the input embedding.
        tied_embeddings: names of further embeddings that use them (an encoder's and a decoder's own).
        format_version: version of the packed tensors' format, see `packing.py`.
        checksums: checksums of tensors and config, written when the model is saved and checked when it is loaded (see
            `packed/checksums.py`); None: only sizes, dtypes, masks and scales are checked.

    Raises:
        ValueError: a field has a wrong type or lies outside its range; the message says what is accepted.
        TypeError: there is no such field; the message says which one is like it.
    """

    bits: float | None = None
    calibration: Any = "builtin"
    num_samples: int = 512
    image_tokens: int | None = None
    seed: int = 0
    max_length: int = 2048
    batch_size: int = 8
    written_samples: int | None = None
    allow_text_only: bool = False
    allow_urls: bool = False
    rest_bits: int = DENSE
    vision_bits: int | None = None
    projector_bits: int | None = None
    embedding_bits: int | None = None
    head_bits: int | None = None
    portable: str | None = None
    modules_to_not_convert: list[str] | None = None
    allow_low_coverage: bool = False
    language_blocks: list[str] | None = None
    processor: Any = None
    progress: Any = None
    preset: str | None = None
    fit: str = "hessian"
    modality_balance: str = "equal"
    significance: str = "gradient"
    budget: str = "sensitivity"
    sensitivity_samples: int = 64
    alternations: int = 15
    damping: float = 0.01
    block_size: int = 128
    salient_top_p: float = 0.05
    diff_quantile: float = 0.5
    sparsity_threshold: float = 0.005
    refine_steps: int | None = None
    refine_batch: int = 32
    refine_loss: str = "balanced"
    refine_scale_rate: float = 5e-3
    refine_latent_rate: float = 2e-2
    distil_steps: int | None = None
    distil_batch: int = 8
    distil_scale_rate: float | None = None
    distil_latent_rate: float | None = None
    compute_device: str | None = None
    checkpoint_dir: str | None = None
    offload_dir: str | None = None
    cache_device_gib: float | None = None
    cache_ram_gib: float | None = None
    process_timeout: float = 1800.0
    modules: dict[str, list[int]] = field(default_factory=dict)
    tied_head: bool = False
    tied_embeddings: list[str] = field(default_factory=list)
    format_version: int = FORMAT_VERSION
    checksums: dict[str, Any] | None = None
    quant_method: str = field(default="sab", init=False)

    def __new__(cls, *args: Any, **kwargs: Any) -> SABQuantizationConfig:
        known = [own.name for own in dataclasses.fields(cls) if own.init]
        for name in kwargs:
            if name not in known:
                raise TypeError(
                    f"{cls.__name__} has no field `{name}`{did_you_mean(name, known) or f'; it has {known}'}"
                )
        config = super().__new__(cls)
        config._given = {field.name for field in dataclasses.fields(cls)[: len(args)]} | kwargs.keys()
        return config

    def __post_init__(self):
        self._apply_preset()
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"the checkpoint has format version {self.format_version!r}, this sab_hf reads version {FORMAT_VERSION}; "
                "upgrade sab_hf, from where you installed it"
            )
        if self.bits is not None:
            _check_number(self, "bits", 0, MAX_PLANES + 1, open_low=True)
        check_seed(self.seed)
        for name in ("num_samples", "max_length", "batch_size"):
            _check_integer(self, name, 1)
        if self.image_tokens is not None:
            _check_integer(self, "image_tokens", 1)
        _check_integer(self, "alternations", 1)
        _check_integer(self, "block_size", 1)
        for name in ("refine_steps", "distil_steps", "written_samples"):
            if getattr(self, name) is not None:
                _check_integer(self, name, 0)
        for name in ("refine_batch", "distil_batch"):
            _check_integer(self, name, 1)
        _check_integer(self, "sensitivity_samples", 1)
        _check_number(self, "refine_scale_rate", 0, 1, open_low=True)
        _check_number(self, "refine_latent_rate", 0, 1, open_low=True)
        for name in ("distil_scale_rate", "distil_latent_rate"):
            if getattr(self, name) is not None:
                _check_number(self, name, 0, 1, open_low=True)
        _check_number(self, "damping", 1e-6, 1e3)
        _check_number(self, "salient_top_p", 0, 1, open_low=True)
        _check_number(self, "diff_quantile", 0, 1)
        _check_number(self, "sparsity_threshold", 0, 1)
        for name in ("allow_text_only", "allow_urls", "allow_low_coverage", "tied_head"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}")
        for name in ("rest_bits", *(f"{role}_bits" for role in REST_ROLES)):
            _check_planes(self, name)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {list(choices)}, got {getattr(self, name)!r}")
        if self.progress is not None and not callable(self.progress):
            raise ValueError(f"`progress` must be a function that takes a `Moment`, or None, got {self.progress!r:.80}")
        self._check_portable()
        self._check_machine()
        self._check_modules()

    def _check_portable(self) -> None:
        if self.portable is None:
            return
        if self.bits is not None:
            raise ValueError(
                f'`bits` must be left out with portable="gguf", which has one plane and no residual plane, got {self.bits!r}'
            )
        for name in ("rest_bits", *(f"{role}_bits" for role in REST_ROLES)):
            if getattr(self, name) not in (None, DENSE):
                raise ValueError(
                    f'`{name}` must be left out with portable="gguf", which leaves everything outside the language blocks dense, '
                    f"got {getattr(self, name)!r}; `sab-hf export gguf --embedding` makes embedding and head small"
                )

    def _apply_preset(self) -> None:
        """Give the fields of the preset their values, where they were not given themselves."""
        given = vars(self).pop("_given", set())
        if self.preset is None:
            return
        if not isinstance(self.preset, str) or self.preset not in PRESETS:
            meant = did_you_mean(str(self.preset), PRESETS)
            raise ValueError(f"`preset` must be one of {list(PRESETS)}, got {self.preset!r:.80}{meant}")
        for name, value in PRESETS[self.preset].items():
            if name not in given:
                setattr(self, name, value)

    def _check_machine(self) -> None:
        for name in ("compute_device", "checkpoint_dir", "offload_dir"):
            value = getattr(self, name)
            if isinstance(value, (os.PathLike, torch.device)):
                setattr(self, name, str(value))
            elif value is not None and not (isinstance(value, str) and value):
                raise ValueError(f"`{name}` must be a name or a path, got {value!r}")
        for name in ("cache_device_gib", "cache_ram_gib"):
            if getattr(self, name) is not None:
                _check_number(self, name, 0, 1e6)
        _check_number(self, "process_timeout", 0, 1e7, open_low=True)

    def _check_modules(self) -> None:
        for field_name in ("modules_to_not_convert", "language_blocks", "tied_embeddings"):
            names = getattr(self, field_name)
            if (names is not None or field_name == "tied_embeddings") and not (
                isinstance(names, list) and all(isinstance(name, str) for name in names)
            ):
                raise ValueError(f"`{field_name}` must be a list of module names, got {names!r}")
        if not isinstance(self.modules, dict) or not all(
            isinstance(name, str) and _is_size(size) for name, size in self.modules.items()
        ):
            raise ValueError(
                f"`modules` must map module names to [full planes (1 to {MAX_PLANES}), significant columns], "
                f"got {self.modules!r:.200}"
            )
        if self.checksums is not None and not _are_checksums(self.checksums):
            raise ValueError(f"`checksums` must be None or what `save_pretrained` writes, got {self.checksums!r:.200}")

    @classmethod
    def of(cls, given: SABQuantizationConfig | dict[str, Any] | None) -> SABQuantizationConfig:
        """Return the config that was given: as one, as its fields in a dict, or as None for the defaults.

        Raises:
            ValueError: it is neither, a field is unknown, or a value is not accepted.
        """
        if given is None or isinstance(given, cls):
            return given or cls()
        if isinstance(given, dict):
            return cls.from_dict(given)
        raise ValueError(
            f"`config` must be a SABQuantizationConfig or a dict of its fields, got {type(given).__name__}"
        )

    def bits_of(self, role: str) -> int:
        """Return the sign planes of a role outside the language blocks; `DENSE` for none."""
        own = getattr(self, f"{role}_bits")
        return self.rest_bits if own is None else own

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs):
        """Build a config from the plain data of `to_dict` (as in `config.json`).

        Raises:
            ValueError: a key is unknown, or a value is not accepted.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        config_dict = {**config_dict, **{key: value for key, value in kwargs.items() if key in known}}
        method = config_dict.pop("quant_method", "sab")
        if method != "sab":
            raise ValueError(f"`quant_method` must be 'sab', got {method!r}")
        version = config_dict.get("format_version", FORMAT_VERSION)
        unknown = sorted(config_dict.keys() - known)
        if (
            unknown and version == FORMAT_VERSION
        ):  # a newer version may have new fields; its number is the better message
            meant = did_you_mean(unknown[0], known) or f"; accepted are {sorted(known)}"
            raise ValueError(f"unknown fields {unknown} in the quantization config{meant}")
        config = cls(**{key: value for key, value in config_dict.items() if key in known})
        unused = {key: value for key, value in kwargs.items() if key not in known}
        return (config, unused) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain JSON data; processor, calibration samples and the machine's fields are left out."""
        plain = {
            f.name: copy.deepcopy(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if f.name not in _NOT_SERIALIZED + _OF_THE_MACHINE + _ONLY_FOR_THE_RUN
        }
        named = isinstance(self.calibration, (str, os.PathLike))
        return plain | {"calibration": without_path(str(self.calibration)) if named else "custom"}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return `to_dict`: a checkpoint records every number, also those that are today's defaults."""
        return self.to_dict()

    def __iter__(self):
        yield from self.to_dict().items()

    def __deepcopy__(self, memo) -> SABQuantizationConfig:
        # transformers deep-copies configs; calibration samples and processors are shared, not copied
        shared = {name: getattr(self, name) for name in _NOT_SERIALIZED}
        own = {
            f.name: copy.deepcopy(getattr(self, f.name), memo)
            for f in dataclasses.fields(self)
            if f.init and f.name not in shared
        }
        return type(self)(**own, **shared)


# Not as a decorator: type checkers do not see through it, and would know no field of the class.
register_quantization_config("sab")(SABQuantizationConfig)


def without_path(name: str) -> str:
    """Return the last two parts of a path on this machine, which means nothing elsewhere; anything else as it is."""
    return "/".join(Path(name).absolute().parts[-2:]) if Path(name).exists() else name


def check_seed(seed: Any) -> None:
    """Raise a ValueError unless `seed` is one that all random generators take."""
    _raise_unless_integer("seed", seed, 0, MAX_SEED)


def _check_integer(config: SABQuantizationConfig, name: str, low: int) -> None:
    _raise_unless_integer(name, getattr(config, name), low, MAX_COUNT)


def _raise_unless_integer(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"`{name}` must be an integer of at least {low} and at most {high}, got {value!r:.80}")


def _check_number(config: SABQuantizationConfig, name: str, low: float, high: float, open_low: bool = False) -> None:
    value = getattr(config, name)
    valid = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not valid or not low <= value <= high or (open_low and value == low):
        bound = "above" if open_low else "at least"
        raise ValueError(f"`{name}` must be a number {bound} {low} and at most {high}, got {value!r}")


def _check_planes(config: SABQuantizationConfig, name: str) -> None:
    value = getattr(config, name)
    if value is None and name != "rest_bits":
        return
    if type(value) is not int or not (1 <= value <= MAX_PLANES or value == DENSE):
        raise ValueError(
            f"`{name}` must be an integer from 1 to {MAX_PLANES} (sign planes) or {DENSE} (dense), got {value!r}"
        )


def _is_size(size: Any) -> bool:
    """Whether `size` is [full planes, significant columns]."""
    return (
        isinstance(size, list)
        and len(size) == 2
        and all(type(count) is int for count in size)
        and 1 <= size[0] <= MAX_PLANES
        and size[1] >= 0
    )


def _is_inside(name: str) -> bool:
    """Whether `name` is that of a file in a folder, or in one below."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts and "\\" not in name


def _are_checksums(value: Any) -> bool:
    """Whether `value` has the form of `packed/checksums.py`."""
    return (
        isinstance(value, dict)
        and value.keys() - {"files"} == {"tensors", "aliases", "config"}
        and isinstance(value["config"], str)
        and all(
            isinstance(part, dict) and all(isinstance(entry, str) for entry in part.values())
            for part in (value["tensors"], value["aliases"], value.get("files", {}))
        )
        and all(_is_inside(name) for name in value.get("files", {}))
    )
