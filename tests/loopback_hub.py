"""A model hub on the loopback interface: the endpoints that huggingface_hub uses to create, upload, look at and download.

`python tests/loopback_hub.py` runs it alone, to try publishing without an account.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

USER = "me"


class LoopbackHub:
    """Repositories in memory; large files go through the LFS protocol, others through the commit itself.

    Attributes:
        url: for `HF_ENDPOINT`.
        repos: repo id, with "datasets/" before that of a data set → list of commits, each {path: content}; the last one is
            "main", and every branch.
        branches: (repo id, name) of those that were made.
        requests: method and path of every request.
        gated: repo ids whose files are not given to anybody.
        refused: name of an endpoint that answers "no quota", such as "commit"; None: all work.
    """

    def __init__(self, port: int = 0):
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.branches: set[tuple[str, str]] = set()
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.gated: set[str] = set()
        self.refused: str | None = None
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def files(self, repo_id: str) -> dict[str, bytes]:
        return self.repos[repo_id][-1]

    def sha(self, repo_id: str) -> str:
        listing = {path: hashlib.sha1(content).hexdigest() for path, content in self.files(repo_id).items()}
        return hashlib.sha1(json.dumps([len(self.repos[repo_id]), listing]).encode()).hexdigest()


@contextlib.contextmanager
def running_hub() -> Iterator[LoopbackHub]:
    hub = LoopbackHub()
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._route("GET")

    def do_HEAD(self):
        self._route("HEAD")

    def do_POST(self):
        self._route("POST")

    def do_PUT(self):
        self._route("PUT")

    def _route(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{method} {path}")
        for allowed, pattern, handle in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in allowed and handle.__name__ == self.hub.refused:
                return self._error(403, "Forbidden", "no quota")
            if match and method in allowed:
                return handle(self, body, *match.groups())
        return self._error(404, "EntryNotFound", f"this hub does not speak {method} {path}")

    def _reply(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content: object, status: int = 200) -> None:
        self._reply(json.dumps(content).encode(), status, Content_Type="application/json")

    def _error(self, status: int, code: str, message: str) -> None:
        self._reply(
            json.dumps({"error": message}).encode(), status, X_Error_Code=code, X_Error_Message=message,
            Content_Type="application/json",
        )  # fmt: skip

    # ---- endpoints

    def whoami(self, body):
        self._json(
            {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        )

    def create(self, body):
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        exists = repo_id in self.hub.repos
        self.hub.repos.setdefault(repo_id, [{}])
        self._json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}, 409 if exists else 200)

    def validate(self, body):
        assert json.loads(body)["content"].startswith("---")
        self._json({"errors": [], "warnings": []})

    def branch(self, body, repo_id, name):
        self.hub.branches.add((repo_id, name))
        self._json({})

    def preupload(self, body, repo_id, revision):
        if revision != "main" and (repo_id, revision) not in self.hub.branches:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = [
            {"path": file["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
            for file in json.loads(body)["files"]
        ]  # fmt: skip
        return self._json({"files": files})

    def lfs_batch(self, body, repo_id):
        objects = [
            {"oid": each["oid"], "size": each["size"],
             "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}", "header": {}}}}
            for each in json.loads(body)["objects"]
        ]  # fmt: skip
        self._reply(
            json.dumps({"transfer": "basic", "objects": objects}).encode(),
            Content_Type="application/vnd.git-lfs+json",
        )

    def lfs_put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self._error(400, "BadRequest", "the content has another hash")
        self.hub.blobs[oid] = body
        return self._reply(b"")

    def commit(self, body, repo_id, revision):
        files = dict(self.hub.files(repo_id))
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        self.hub.repos[repo_id].append(files)
        sha = self.hub.sha(repo_id)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"})

    def info(self, body, repo_id, *revision):
        if repo_id not in self.hub.repos:
            return self._error(404, "RepoNotFound", "Repository not found")
        return self._json(
            {"id": repo_id, "modelId": repo_id, "sha": self.hub.sha(repo_id), "private": False, "tags": [],
             "siblings": [{"rfilename": path} for path in self.hub.files(repo_id)]}
        )  # fmt: skip

    def tree(self, body, repo_id, revision, folder):
        if repo_id not in self.hub.repos:
            return self._error(404, "RepoNotFound", "Repository not found")
        under = f"{folder.strip('/')}/" if folder else ""
        files = {path: content for path, content in self.hub.files(repo_id).items() if path.startswith(under)}
        if under and not files:
            return self._error(404, "EntryNotFound", "Entry not found")
        return self._json(
            [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
            ]
        )

    def resolve(self, body, repo_id, revision, path):
        if repo_id not in self.hub.repos:
            return self._error(404, "RepoNotFound", "Repository not found")
        if repo_id in self.hub.gated:
            return self._error(403, "GatedRepo", f"Access to model {repo_id} is restricted")
        content = self.hub.files(repo_id).get(path)
        if content is None:
            return self._error(404, "EntryNotFound", "Entry not found")
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Repo_Commit": self.hub.sha(repo_id),
            "Accept_Ranges": "bytes", "Content_Type": "application/octet-stream",
        }  # fmt: skip
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
            return self._reply(content[start : end + 1], 206, **headers)
        return self._reply(content, **headers)


_REPO = r"((?:datasets/)?[^/]+/[^/]+)"
_OF = r"/api/(?:models/)?"
_ROUTES = (
    (("GET",), r"/api/whoami-v2", _Handler.whoami),
    (("POST",), r"/api/repos/create", _Handler.create),
    (("POST",), r"/api/validate-yaml", _Handler.validate),
    (("POST",), rf"{_OF}{_REPO}/branch/([^/]+)", _Handler.branch),
    (("POST",), rf"{_OF}{_REPO}/preupload/([^/]+)", _Handler.preupload),
    (("POST",), rf"{_OF}{_REPO}/commit/([^/]+)", _Handler.commit),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), r"/lfs/([0-9a-f]{64})", _Handler.lfs_put),
    (("GET",), rf"{_OF}{_REPO}/tree/([^/]+)(/.*)?", _Handler.tree),
    (("GET",), rf"{_OF}{_REPO}(?:/revision/([^/]+))?", _Handler.info),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
)


def main() -> None:
    """Run the module as a script."""
    parser = argparse.ArgumentParser(description="Run a model hub on this machine; it forgets everything when it ends.")
    parser.add_argument("--port", type=int, default=8765)
    hub = LoopbackHub(parser.parse_args().port)
    sys.stdout.write(f"export HF_ENDPOINT={hub.url} HF_TOKEN=hf_any HF_HUB_DISABLE_XET=1\n")
    sys.stdout.flush()
    with contextlib.suppress(KeyboardInterrupt):
        hub.server.serve_forever()


if __name__ == "__main__":
    main()
