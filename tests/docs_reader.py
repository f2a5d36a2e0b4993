"""Read the code of a documentation page: fenced blocks, and what the page says about running them.

In a page, an HTML comment `<!-- replace: OLD -> NEW -->` names what a test puts in place of a name or a long setting, and
`<!-- output -->` before a ```text block says that it is, to the letter, what the block before it prints. ```python and
```bash blocks are run; ```shell blocks are commands that install software, or start servers or several processes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
OTHER_PAGES = (ROOT, ROOT / "benchmarks", ROOT / "examples" / "tiny_vlm")
ALL_PAGES = sorted(str(path.relative_to(ROOT)) for folder in (DOCS, *OTHER_PAGES) for path in folder.glob("*.md"))

_FENCE = re.compile(r"(?P<mark><!-- output -->\n)?^```(?P<kind>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_REPLACE = re.compile(r"^<!-- replace: (.+?) -> (.*?) -->$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its kind (the word after the fence), its text, and whether it is the output of the one before."""

    kind: str
    code: str
    is_output: bool
    line: int


def read_page(name: str) -> tuple[list[Block], dict[str, str]]:
    """Return the blocks of a page, with its replacements made, and the replacements."""
    text = (DOCS / name).read_text(encoding="utf-8")
    replacements = dict(_REPLACE.findall(text))
    blocks = []
    for found in _FENCE.finditer(text):
        code = found["code"]
        for old, new in replacements.items():
            code = code.replace(old, new)
        blocks.append(Block(found["kind"], code, bool(found["mark"]), text.count("\n", 0, found.start()) + 1))
    return blocks, replacements


def links(page: Path) -> list[tuple[Path, str]]:
    """Return the files that a page's links name, with the heading in them that each names, or ""; other sites left out."""
    targets = re.findall(r"\]\(([^)]+)\)", _FENCE.sub("", page.read_text(encoding="utf-8")))
    parts = [target.partition("#") for target in targets if not target.startswith("http")]
    return [((page.parent / file).resolve() if file else page, anchor) for file, _, anchor in parts]


def anchors(page: Path) -> set[str]:
    """Return the names by which links reach the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
