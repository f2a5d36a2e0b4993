"""Files by URL, from a server on the loopback interface that tests stand in for a public one."""

import http.server
import socket
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from sab_hf.calibration import urls
from sab_hf.calibration.pictures import open_picture
from sab_hf.calibration.samples import load_media, parse_sample


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Host"]))
        if self.path == "/drip":
            for byte in b"HTTP/1.1 200 OK\r\nA: " + b"b" * 1000:
                self.server.dripped += 1
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.05)
        elif self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
        elif self.path == "/gone":
            self.send_error(404)
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.server.content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    Image.new("RGB", (20, 10), (90, 0, 0)).save(tmp_path / "a.png")
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    running.asked, running.dripped, running.content = [], 0, (tmp_path / "a.png").read_bytes()
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def public(server, monkeypatch):
    """The server under a public name: `pictures.test` is looked up as it, and the checks take its address for a public one."""
    look_up = socket.getaddrinfo

    def getaddrinfo(host, *args, **kwargs):
        return look_up("127.0.0.1" if host == "pictures.test" else host, *args, **kwargs)

    is_public = urls._is_public
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(urls, "_is_public", lambda address: str(address) == "127.0.0.1" or is_public(address))
    return f"http://pictures.test:{server.server_port}"


def test_a_picture_is_fetched_where_the_user_allows_it(public, server):
    with pytest.raises(ValueError, match="not fetched unless you allow it"):
        open_picture(f"{public}/a.png", None, None, allow_urls=False)
    assert server.asked == []
    assert open_picture(f"{public}/a.png?size=1", None, None, allow_urls=True).getpixel((0, 0)) == (90, 0, 0)
    assert server.asked == [("/a.png?size=1", f"pictures.test:{server.server_port}")]


def test_video_is_fetched_into_a_file(public, server, tmp_path):
    content = [{"type": "video", "url": f"{public}/clip.mp4"}]
    sample = parse_sample([{"role": "user", "content": content}], "row 1")
    (part,) = load_media(sample, None, allow_urls=True, scratch=tmp_path)[0]["content"]
    assert Path(part["video"]).suffix == ".mp4"
    assert Path(part["video"]).read_bytes() == server.content


def test_redirects_are_followed_a_few_times(public, server):
    assert urls.fetch(f"{public}/to//a.png") == server.content
    assert urls.fetch(f"{public}/to/{public}/a.png") == server.content
    with pytest.raises(OSError, match="more than 5 redirects"):
        urls.fetch(public + 7 * "/to/" + "/a.png")


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "localhost", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "[::1]", "[fe80::1]",
     "[::ffff:127.0.0.1]", "[fc00::1]", "[2002:7f00:1::]", "100.64.0.1", "224.0.0.1", "2130706433", "0x7f.1"],
)  # fmt: skip
def test_addresses_that_are_not_public_are_not_asked(address, server):
    port = server.server_port
    with pytest.raises(ValueError, match="no public address"):
        urls.fetch(f"http://{address}:{port}/a.png")
    assert server.asked == []


def test_a_redirect_to_a_private_address_is_not_followed(public, server):
    for target in (f"http://127.0.0.2:{server.server_port}/secret", "http://169.254.169.254/latest/meta-data"):
        with pytest.raises(ValueError, match="no public address"):
            urls.fetch(f"{public}/to/{target}")
    assert [path for path, _ in server.asked if path.startswith("/secret")] == []
    with pytest.raises(ValueError, match="an http or https URL is required, got file:"):
        urls.fetch(f"{public}/to/file:///etc/passwd")


def test_the_address_that_was_checked_is_the_one_that_is_asked(public, server, monkeypatch):
    """A name that changes between check and connection leads nowhere else."""
    answers = iter(["127.0.0.1"])
    look_up = socket.getaddrinfo

    def getaddrinfo(host, *args, **kwargs):
        return look_up(next(answers) if host == "changing.test" else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert urls.fetch(f"http://changing.test:{server.server_port}/a.png") == server.content


def test_bytes_and_seconds_are_limited(public, server):
    server.content = b"x" * 200_000
    with pytest.raises(OSError, match="the file is longer than 100,000 bytes"):
        urls.fetch(f"{public}/a.png", max_bytes=100_000)
    with pytest.raises(TimeoutError, match="did not send the file within"):
        urls.fetch(f"{public}/drip", max_seconds=0.5)
    assert server.dripped < 500  # of a thousand bytes, twenty a second


def test_answers_that_are_no_file_are_errors(public):
    with pytest.raises(OSError, match="answered with status 404"):
        urls.fetch(f"{public}/gone")
    for wrong, reason in (
        ("http://", "is required"),
        ("https://a.test:port/", "Port"),
        ("http://a..b/", "no name of a host"),
    ):
        with pytest.raises(ValueError, match=reason):
            urls.fetch(wrong)
