"""Templates of pages: whatever is put into one is escaped, for HTML and SVG by Jinja's autoescape, for Markdown by `as_text`."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Undefined
from markupsafe import Markup

_OPTIONS = {
    "loader": FileSystemLoader(Path(__file__).with_name("templates")),
    "trim_blocks": True,
    "lstrip_blocks": True,
    "keep_trailing_newline": True,
}


def as_text(value: Any) -> str:
    """Return a value as text of Markdown, on one line: nothing in it is markup, HTML or the end of a table's cell."""
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


def as_code(value: Any) -> str:
    """Return a value as inline code of Markdown, on one line, delimited by more backticks than it holds."""
    text = " ".join(str(value).split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"


def _written(value: Any) -> Any:
    """Return what stands in a page of Markdown for a value: itself if it is Markdown already, else its text."""
    return value if isinstance(value, (Markup, Undefined)) else as_text(value)


MARKUP = Environment(autoescape=True, undefined=StrictUndefined, **_OPTIONS)
"""Pages and pictures: HTML, SVG."""
MARKDOWN = Environment(finalize=_written, **_OPTIONS)
"""Cards. `{{ value }}` is text, `{{ value | code }}` inline code, `{{ value | as_is }}` what was checked before."""
MARKDOWN.filters["code"] = lambda value: Markup(as_code(value))
MARKDOWN.filters["as_is"] = Markup
