"""docs/families.md from the outcomes of `tests/families.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

REST_BITS = (16, 4)
DOC = Path(__file__).parents[2] / "docs" / "families.md"

NOTES = {
    "gemma3n": "its text model; the vision tower needs `timm`, which was not installed",
    "kosmos2": "batches need a `modality` entry: the config names no image token",
    "florence2": "encoder and decoder, the encoder first; batches need `labels` or `decoder_input_ids`",
    "blip_2_t5": "BLIP-2 on T5: encoder and decoder; batches need `labels` or `decoder_input_ids`",
    "blip_2": "BLIP-2 on OPT; the Q-Former counts as projector",
    "instructblip": "on OPT; the Q-Former counts as projector",
    "mllama": "cross-attention blocks too; text-only samples pass them by",
    "llama4_text": "the text model alone",
    "gemma4": "blocks that share keys and values, embeddings for each layer",
    "qwen2_5_omni_thinker": "text, image and audio in one set",
    "blip": "image features through cross-attention only: needs `allow_text_only`",
    "git": "image features before the text",
    "idefics": "needs `allow_text_only`",
    "chameleon": "images are tokens of the vocabulary; batches need a `modality` entry",
    "evolla": "keys and values of protein features in `modules_to_not_convert`",
    "kosmos2_5": "batches need a `modality` entry: the config names no image token",
    "voxtral_realtime": "generation from a stream of sound was not tried",
    "diffusion_gemma": "its decoder reads the encoder's cache, and blocks are calibrated without one",
    "kyutai_speech_to_text": "generation from sound was not tried",
    "pp_formulanet": "an image encoder and a text decoder",
    "pix2struct": "an image encoder and a text decoder",
    "vision_encoder_decoder": "an image encoder and a text decoder: Donut, TrOCR",
    "inkling": "needs `scipy`",
    "t5gemma2": "encoder and decoder, with the image in the encoder; batches need `labels` or `decoder_input_ids`",
    "udop": "encoder and decoder; patches of the page stand beside the tokens",
}

NOT_BUILT = {
    "fast_vlm, perception_lm": "not tried: their towers need `timm`, which was not installed",
    "qwen2_5_omni, qwen3_omni_moe": "no forward pass over tokens: load the thinker's class, which is in the list",
    "pi0": "no language model: it gives actions of a robot",
}
"""Families of the two auto classes that are not in the zoo, and why."""

HEAD = """# Families

This page lists the model families that were tested. For each family, a tiny random model of its real class is saved as a dense
checkpoint, quantized while it loads (one step each of refinement and distillation, a few processed batches with the family's
placeholder tokens), run with `generate`, saved, and loaded again. A family passes if

- the logits are those of the dense model with the weights that the planes stand for,
- after reloading, logits and generated tokens have the same bits as before saving, and
- no language Linear and no expert stays dense, except routers and Linears too small to shrink.

The test says nothing about accuracy (the weights are random) or speed (the models are tiny), and does not cover processors.

Each version of transformers was tested twice: with towers, projector, embedding and head dense (the defaults), and with
`rest_bits=4`. Families are those of `AutoModelForImageTextToText` and `AutoModelForMultimodalLM`, a few text models, and
parts of both.

No code of the package knows a family by name. "Language weights covered" is `report(model).coverage`: the rest are routers,
low-rank side paths and gates.

"""

TAIL = """
## What is quantized

- **Blocks**: every `nn.Linear` of the language blocks, except those of which one sign plane would take more than 4 bits per
  weight (a gate of one row, a 4×4 mixing matrix).
- **Experts**: each expert has separate planes, even if the model keeps all experts in one 3-D parameter; such an expert is called
  `….experts.split.gate_up_proj.3`. Its second moments are those of the tokens that the router sent it. An expert that saw fewer
  tokens than it has inputs is fitted to the tokens of all experts of its layer; `report(model)` and the log count these.
- **Routers** stay dense.
- **Encoder-decoders**: the encoder's blocks, then the decoder's on what the quantized encoder gives.
- **Cross-attention**: keys and values of image features are calibrated on those features, as the image's modality.
- **Bits** go where the measured sensitivity of the loss is highest. If it cannot be measured (an encoder's blocks, which the loss
  reaches only through the decoder), they are spread evenly, with a warning. Blocks that share keys and values with later ones
  (Gemma 3n, Gemma 4) are measured by their own use of them.
- **Coverage**: below 90 % of the language weights, quantizing is refused with a list of what stays dense and why;
  `allow_low_coverage=True` permits it.

## What does not work, or differs

- A mixture of experts that was packed under transformers 4 cannot be loaded under 5, and the other way round, where the two name
  the experts differently (Qwen3-MoE, GLM-4V-MoE, Aria): loading says so. Pack it with the version that will read it. The same
  holds for Gemma 3n from 4 to 5, which no longer has the keys and values that its last blocks do not use.
- `Conv1D` weights (GPT-2) are no `nn.Linear`: no list of blocks is found. Models whose blocks are not in a `ModuleList` under the
  text model can name it: `SABQuantizationConfig(language_blocks=["decoder.stack"])`.
- Models without one forward pass over tokens (Qwen2.5-Omni as a whole) are quantized by their part that reads tokens: load the
  thinker's class.
- These models are refused, since the modality of their positions is not known: those that read no tokens before their decoder
  (Donut, TrOCR, Pix2Struct: image encoders), those whose hidden states hold positions without a token (GIT, UDOP: image features
  beside the text), and those with several streams on the third axis (GLM-5-Next).
- Where the embedding is tied and does more than look rows up and multiply them by a number, or where the model's code reads
  `tie_word_embeddings` (T5 of transformers 4), embedding and head stay dense with `rest_bits`; naming their bits is an error.
- Blocks that run twice, out of order, or never for the calibration samples are refused.
- Samples with video need a video processor, which needs torchvision; processed batches do not.
"""


def write_table(outcomes: list[Mapping[str, Any]]) -> None:
    """Write docs/families.md from the outcomes of one or several versions of transformers; of two alike the later counts."""
    versions = sorted({o["version"] for o in outcomes}, key=lambda version: [int(part) for part in version.split(".")])
    by_key = {(o["family"], o["version"], o["rest_bits"]): o for o in outcomes}
    lines = [
        f"| family | language weights covered | calibrated on | quantized Linears, by kind | {' | '.join(versions)} | remark |",
        "|" + "---|" * (5 + len(versions)),
    ]
    reasons: dict[str, list[str]] = {}
    for family in dict.fromkeys(o["family"] for o in outcomes):
        rows = {key: o for key, o in by_key.items() if key[0] == family}
        works = [o for o in rows.values() if not o["problem"]]
        cells = [_cell([rows.get((family, version, bits)) for bits in REST_BITS], reasons) for version in versions]
        shown = works[-1] if works else None
        covered = f"{100 * shown['coverage']:.1f} %" if shown else ""
        media = ", ".join(shown["modalities"]) if shown else ""
        remarks = [NOTES.get(family, ""), "" if shown is None or shown["measured"] else "bits spread evenly"]
        remark = "; ".join(part for part in remarks if part)
        lines.append(f"| {family} | {covered} | {media} | {_kinds(shown)} | {' | '.join(cells)} | {remark} |")
    lines += [f"| {family} |  |  |  |{' – |' * len(versions)} {why} |" for family, why in NOT_BUILT.items()]
    legend = (
        '\n"yes": both tests passed. "–": this version of transformers has no such class. Where the two tests differ, '
        "dense comes first.\n"
    )
    if reasons:
        legend += "\nWhy not:\n\n" + "".join(
            f"{number}. {', '.join(where)}: {why}\n" for number, (why, where) in enumerate(reasons.items(), 1)
        )
    command = (
        "\nThis page is made by `python tests/families.py --rest-bits 16 4 --json FILE` on each version, then `--table FILE …`.\n"
        "`pytest tests/anatomy/test_families.py` runs a part of it, with `-m slow` the rest.\n"
    )
    DOC.parent.mkdir(exist_ok=True)
    DOC.write_text(HEAD + "\n".join(lines) + "\n" + legend + command + TAIL)


def _cell(outcomes: list[Mapping[str, Any] | None], reasons: dict[str, list[str]]) -> str:
    """Return what a version's two outcomes of a family say, and note why not in `reasons`: reason → where."""
    words = []
    for outcome in outcomes:
        if outcome is None:
            words.append("not run")
        elif not outcome["problem"]:
            words.append("yes")
        elif outcome["problem"].startswith("not in transformers"):
            words.append("–")
        else:
            where = reasons.setdefault(outcome["problem"], [])
            place = f"`{outcome['family']}`, {outcome['version']}"
            if place not in where:
                where.append(place)
            words.append(f"no ({list(reasons).index(outcome['problem']) + 1})")
    return ", ".join(dict.fromkeys(words))


def _kinds(outcome: Mapping[str, Any] | None) -> str:
    """Return the kinds of quantized Linears, the parts of their names before the last one joined."""
    if outcome is None:
        return ""
    groups: dict[str, list[str]] = {}
    for name in outcome["quantized"]:
        head, _, last = name.rpartition(".")
        if last == "*":
            head, _, last = head.rpartition(".")
        groups.setdefault(head, []).append(last)
    return "; ".join(f"`{head}`: {' '.join(tails)}" if head else " ".join(tails) for head, tails in groups.items())
