"""Which part of the model a module belongs to, found by structure and not by name.

The text model is the parent of the input embedding; its longest list of alike blocks holds the language blocks. Lists of
alike blocks elsewhere make the vision (or audio) towers, and what is left between towers and text model is the projector.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

LANGUAGE, VISION, PROJECTOR, EMBEDDING, HEAD = "language", "vision", "projector", "embedding", "head"


@dataclass(frozen=True)
class Roles:
    """The parts of a model.

    Attributes:
        blocks: names of the language blocks, in the order in which they run.
        embedding: name of the input embedding.
        head: name of the output embedding, or None.
        vision: prefixes of the towers (vision, audio).
    """

    blocks: tuple[str, ...]
    embedding: str
    head: str | None
    vision: tuple[str, ...]

    def of(self, name: str) -> str:
        """Return the role of the module or tensor called `name`."""
        if name == self.embedding or name.startswith(f"{self.embedding}."):
            return EMBEDDING
        if self.head is not None and (name == self.head or name.startswith(f"{self.head}.")):
            return HEAD
        if _is_under(name, self.vision):
            return VISION
        if _is_under(name, (self._text_model,)):
            return LANGUAGE
        return PROJECTOR

    @property
    def _text_model(self) -> str:
        return self.embedding.rpartition(".")[0]


def find_roles(model: nn.Module) -> Roles:
    """Find the language blocks, towers, embedding and head of a transformers model.

    Raises:
        ValueError: the model has no input embedding, or no list of alike blocks beside it.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding = names[model.get_input_embeddings()]
    head = model.get_output_embeddings()
    text_model = embedding.rpartition(".")[0]
    lists = _block_lists(model)
    language = [(name, blocks) for name, blocks in lists.items() if _is_under(name, (text_model,))]
    if not language:
        raise ValueError(
            f"found no list of alike blocks in the text model `{text_model}` of {type(model).__name__}; "
            "this architecture is not supported yet"
        )
    list_name, blocks = max(language, key=lambda item: len(item[1]))
    towers = [name for name in lists if not _is_under(name, (text_model,))]
    return Roles(
        blocks=tuple(f"{list_name}.{i}" for i in range(len(blocks))),
        embedding=embedding,
        head=names.get(head),
        vision=tuple(sorted({_tower(name, text_model) for name in towers})),
    )


def _block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the outermost ModuleLists whose items are of one class and hold Linears (packed or not)."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module) or _is_under(name, tuple(lists)):
            continue
        holds_linears = any(hasattr(m, "in_features") for m in module[0].modules())
        if holds_linears and len({type(item) for item in module}) == 1:
            lists[name] = module
    return lists


def _tower(list_name: str, text_model: str) -> str:
    """Return the largest part of the model that holds the list but not the text model."""
    own, other = list_name.split("."), text_model.split(".")
    shared = 0
    while shared < min(len(own), len(other)) and own[shared] == other[shared]:
        shared += 1
    return ".".join(own[: shared + 1])


def _is_under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or not prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
