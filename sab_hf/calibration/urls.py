"""Files by URL, which a data set from elsewhere may name: bytes and seconds are limited, and only public addresses are asked."""

from __future__ import annotations

import ipaddress
import socket
import threading
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

MAX_PICTURE_BYTES, MAX_MEDIA_BYTES = 64 * 2**20, 1024 * 2**20
"""Most bytes of a picture, and of a video or of sound."""
MAX_SECONDS = 60.0
"""Most time that one file may take, redirects included."""

_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 2**16
_TIMEOUT = (10, 20)  # s, to connect and between two pieces


def fetch(url: str, max_bytes: int = MAX_PICTURE_BYTES, max_seconds: float = MAX_SECONDS) -> bytes:
    """Return the content of an http or https URL.

    Each name, also that of a redirect, is looked up once, and the connection goes to an address that was found and checked.

    Args:
        url: where the file is.
        max_bytes: a longer answer is an error.
        max_seconds: a slower one, too.

    Raises:
        OSError: the server does not answer, or the answer is an error, too long or too slow.
        ValueError: the URL, or a redirect, is no http(s) URL or leads to an address that is not public.
    """
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(_follow(url, max_bytes))
        except Exception as error:  # handed to the caller
            outcome.append(error)

    # A thread, since no timeout of a client covers a server that sends one byte of its headers at a time.
    thread = threading.Thread(target=work, daemon=True, name="fetch")
    thread.start()
    thread.join(max_seconds)
    if not outcome:
        raise TimeoutError(f"the server did not send the file within {max_seconds:.0f} s")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _follow(url: str, max_bytes: int) -> bytes:
    for _ in range(_MAX_REDIRECTS + 1):
        found = _get(url, max_bytes)
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
    raise OSError(f"more than {_MAX_REDIRECTS} redirects")


def _get(url: str, max_bytes: int) -> bytes | str:
    """Return the content of a URL, or where it redirects to."""
    import requests

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"an http or https URL is required, got {parts.scheme}://{parts.netloc}")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    error: Exception | None = None
    for address in public_addresses(parts.hostname, port):
        with _session(parts, address) as session:
            try:
                with session.get(
                    url,
                    stream=True,
                    timeout=_TIMEOUT,
                    allow_redirects=False,
                    headers={"Accept-Encoding": "identity"},
                ) as response:
                    return _content(response, max_bytes)
            except requests.exceptions.ConnectionError as problem:
                error = problem
    raise OSError(f"no connection to {parts.hostname}: {error}")


def _content(response: Any, max_bytes: int) -> bytes | str:
    if response.status_code in _REDIRECTS and "location" in response.headers:
        return response.headers["location"]
    if response.status_code != 200:
        raise OSError(f"the server answered with status {response.status_code}")
    content = bytearray()
    for chunk in response.iter_content(_CHUNK):
        content += chunk
        if len(content) > max_bytes:
            raise OSError(f"the file is longer than {max_bytes:,} bytes")
    return bytes(content)


def _session(parts: SplitResult, address: str) -> Any:
    """Return a session whose connections go to `address`; certificates are checked for the name in the URL."""
    import requests
    from requests.adapters import HTTPAdapter

    class Pinned(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs, server_hostname=parts.hostname)

        def send(self, request: Any, **kwargs: Any) -> Any:
            host = f"[{address}]" if ":" in address else address
            request.headers["Host"] = parts.netloc.rpartition("@")[2]
            request.url = urlsplit(request.url)._replace(netloc=f"{host}:{parts.port}" if parts.port else host).geturl()
            return super().send(request, **kwargs)

    session = requests.Session()
    session.auth = lambda request: request  # no password from a .netrc
    for scheme in ("http://", "https://"):
        session.mount(scheme, Pinned())
    return session


def public_addresses(host: str, port: int) -> list[str]:
    """Return the addresses of a host.

    Raises:
        ValueError: one of them is private, loopback, link-local or otherwise not public.
        OSError: the host has none.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # a label that is empty or too long
        raise ValueError(f"{host[:60]!r} is no name of a host ({error})") from error
    addresses = list(dict.fromkeys(entry[4][0] for entry in found))
    for address in addresses:
        if not _is_public(ipaddress.ip_address(address.partition("%")[0])):
            raise ValueError(f"{host} is at {address}, which is no public address")
    return addresses


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    return address.is_global and not address.is_multicast if inner is None else _is_public(inner)
