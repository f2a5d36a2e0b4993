"""Names that somebody wrote and that do not exist: which one was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean `x`?" with the known name that is most like `name`, or "" if none is."""
    alike = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean `{alike[0]}`?" if alike else ""


def check_misspelt(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise a TypeError if one of the `given` names is nearly one of the `known` ones: it was meant, and would be lost.

    Args:
        given: names that go elsewhere, such as keyword arguments that are passed on.
        known: the names of the function's own arguments.
        where: the function, for the error.
    """
    known = list(known)
    for name in given:
        alike = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if alike:
            raise TypeError(f"{where} has no argument `{name}`; did you mean `{alike[0]}`?")
