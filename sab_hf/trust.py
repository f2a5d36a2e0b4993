"""Code that a model brings with it runs only where the user says so."""

from __future__ import annotations


def trusting(trust_remote_code: bool) -> dict[str, bool]:
    """Return the arguments with which transformers runs such code; without trust none, so that it asks or refuses itself."""
    return {"trust_remote_code": True} if trust_remote_code else {}
