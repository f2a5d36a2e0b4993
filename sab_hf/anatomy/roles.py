"""Which part of the model a module belongs to, found by structure and not by name.

The text model is the parent of the input embedding, or the nearest part around that which has lists of blocks (BERT keeps its
embeddings apart), and the decoder of an encoder-decoder. The lists of blocks nearest to it are the language blocks: one list,
or two in an encoder-decoder. A part with a list of blocks elsewhere is a tower if it takes pixels or sound; otherwise
(Q-formers, resamplers) it is projector, as is all else between towers and text model. A part without such a list is a tower if
it takes pixels or a waveform themselves (convolutional ones), also inside of the text model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

LANGUAGE, VISION, PROJECTOR, EMBEDDING, HEAD = "language", "vision", "projector", "embedding", "head"


@dataclass(frozen=True)
class Roles:
    """The parts of a model.

    Attributes:
        stacks: names of the language blocks in the order in which they run, one tuple for each list of blocks. A later stack
            reads what an earlier one gives: the decoder's blocks the encoder's output.
        embedding: name of the input embedding.
        head: name of the output embedding, or None.
        vision: prefixes of the towers (vision, audio).
        text: prefixes of the text model.
        tables: further embeddings in the text model (of positions, or one for each layer), which have the embedding's role.
    """

    stacks: tuple[tuple[str, ...], ...]
    embedding: str
    head: str | None
    vision: tuple[str, ...]
    text: tuple[str, ...]
    tables: tuple[str, ...] = ()

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of all language blocks, in the order in which they run."""
        return tuple(name for stack in self.stacks for name in stack)

    def of(self, name: str) -> str:
        """Return the role of the module or tensor called `name`."""
        if _is_under(name, (self.embedding, *self.tables)):
            return EMBEDDING
        if self.head is not None and _is_under(name, (self.head,)):
            return HEAD
        if _is_under(name, self.vision):
            return VISION
        if _is_under(name, self.text):
            return LANGUAGE
        return PROJECTOR


def find_roles(model: nn.Module, language_blocks: Sequence[str] | None = None) -> Roles:
    """Find the language blocks, towers, embedding and head of a transformers model.

    Args:
        model: the model, or its skeleton on the meta device.
        language_blocks: names of the lists of language blocks; None: those that the model was quantized with, else found.
    Raises:
        ValueError: the model has no input embedding, or no list of blocks beside it, or not those that were given; the
            message says what to pass.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding = names[_input_embedding(model)]
    lists = _block_lists(model)
    text_models = _text_models(model, embedding, list(lists))
    if language_blocks is None:
        language_blocks = getattr(getattr(model.config, "quantization_config", None), "language_blocks", None)
    if language_blocks is None:
        language = [
            name for part in text_models for name in _nearest([other for other in lists if _is_under(other, (part,))])
        ]
    else:
        language = list(language_blocks)
    _check_language(model, language, lists, text_models[0])
    towers = {_tower(name, language) for name in lists if name not in language}
    media = {name for name in towers if _takes_media(model.get_submodule(name))} or towers
    media |= {name for name in _outside(model, (embedding, *language, *towers)) if _takes_raw_media(model, name)}
    text = _text(text_models, embedding, language)
    return Roles(
        stacks=tuple(tuple(f"{name}.{i}" for i in range(len(model.get_submodule(name)))) for name in language),
        embedding=embedding,
        head=names.get(model.get_output_embeddings()),
        vision=tuple(sorted(media)),
        text=text,
        tables=tuple(
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding)
            and name != embedding
            and _is_under(name, text)
            and not _is_under(name, (*media, *language))
        ),
    )


def _input_embedding(model: nn.Module) -> nn.Module:
    for part in (model, _decoder(model)):
        try:
            embedding = part.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(embedding, nn.Module) and hasattr(
            embedding, "weight"
        ):  # Kyutai's sums several tables: it has none
            break
    else:
        raise ValueError(
            f"{type(model).__name__} has no input embedding (`get_input_embeddings()`), so it is no language model that can be "
            "calibrated; pass the part that reads tokens, such as the `thinker` of an omni model"
        )
    return embedding


def _decoder(model: nn.Module) -> nn.Module | None:
    """Return the decoder of an encoder-decoder, None of any other model."""
    return model.get_decoder() if getattr(model.config, "is_encoder_decoder", False) else None


def _text_models(model: nn.Module, embedding: str, lists: list[str]) -> list[str]:
    """Return the part around the input embedding that has lists of blocks, and a decoder beside it."""
    text_model = parent = embedding.rpartition(".")[0]
    if not any(_is_under(name, (parent,)) for name in lists):
        others = [name for name in lists if not _takes_media(model.get_submodule(_tower(name, [embedding])))]
        while parent and not any(_is_under(name, (parent,)) for name in others):
            parent = parent.rpartition(".")[0]
        if any(_is_under(name, (parent,)) for name in others):
            text_model = parent
    decoder = next((name for name, module in model.named_modules() if module is _decoder(model)), None)
    beside = decoder is not None and not _is_under(decoder, (text_model,)) and not _is_under(text_model, (decoder,))
    return [text_model, decoder] if beside and any(_is_under(name, (decoder,)) for name in lists) else [text_model]


def _text(text_models: list[str], embedding: str, language: list[str]) -> tuple[str, ...]:
    """Return the prefixes of the text model: of one that does not hold the embedding itself, the parts with its blocks and it.

    Such a part may hold more (GIT's holds the image encoder and its projection).
    """
    around, *beside = text_models
    if around == embedding.rpartition(".")[0]:
        return tuple(text_models)
    depth = around.count(".") + 2 if around else 1
    return tuple(dict.fromkeys(".".join(name.split(".")[:depth]) for name in (embedding, *language))) + tuple(beside)


def _outside(model: nn.Module, names: tuple[str, ...], prefix: str = "") -> list[str]:
    """Return the largest parts of the model that neither hold one of `names` nor are in one."""
    found = []
    for child, _ in model.get_submodule(prefix).named_children():
        part = f"{prefix}.{child}".lstrip(".")
        if _is_under(part, names):
            continue
        if any(_is_under(name, (part,)) for name in names):
            found += _outside(model, names, part)
        else:
            found.append(part)
    return found


def _check_language(model: nn.Module, language: list[str], lists: dict[str, nn.ModuleList], text_model: str) -> None:
    wrong = [name for name in language if name not in lists]
    if wrong or not language:
        what = f"`{wrong[0]}` is no list of blocks" if wrong else "no list of blocks was found"
        raise ValueError(
            f"{what} in the text model `{text_model}` of {type(model).__name__}; pass "
            "SABQuantizationConfig(language_blocks=[...]) with the names of the ModuleLists whose items, one after the other, "
            f"turn hidden states into hidden states and hold nn.Linear layers. Lists that do: {sorted(lists) or 'none'}"
        )


def _block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the outermost ModuleLists whose items are larger parts that hold Linears (packed or not)."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not _is_under(name, tuple(lists)):  # noqa: SIM102
            if all(_holds_linears(item) for item in module):
                lists[name] = module
    return lists


def _holds_linears(block: nn.Module) -> bool:
    return any(hasattr(module, "in_features") for module in block.modules() if module is not block)


def _nearest(names: list[str]) -> list[str]:
    """Return the names with the fewest parts."""
    depth = min((name.count(".") for name in names), default=0)
    return [name for name in names if name.count(".") == depth]


def _takes_media(part: nn.Module) -> bool:
    """Whether a part takes pixels or sound: it holds a convolution, or a transformers model says what its input is."""
    return any(
        isinstance(module, nn.modules.conv._ConvNd)
        or getattr(module, "main_input_name", "input_ids") not in ("input_ids", "inputs_embeds")
        for module in part.modules()
    )


def _takes_raw_media(model: nn.Module, name: str) -> bool:
    """Whether a part takes pixels or a waveform themselves: a convolution over a few channels, or what it says of its input."""
    return any(
        (isinstance(module, nn.modules.conv._ConvNd) and module.in_channels <= 4 and module.groups == 1)
        or getattr(module, "main_input_name", "input_ids") not in ("input_ids", "inputs_embeds")
        for module in model.get_submodule(name).modules()
    )


def _tower(list_name: str, language: list[str]) -> str:
    """Return the largest part of the model that holds the list and no language blocks."""
    own = list_name.split(".")
    shared = max(_shared_parts(own, other.split(".")) for other in language)
    return ".".join(own[: shared + 1])


def _shared_parts(one: list[str], other: list[str]) -> int:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


def _is_under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or not prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
