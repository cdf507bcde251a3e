"""A hub on this machine: as much of the HTTP interface as uploads and downloads need."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0" * 40


class FakeHub:
    """Repositories in memory, and what was asked of them."""

    def __init__(self):
        self.files = {}  # repository -> path -> bytes, of its main branch
        self.former = {}  # repository, commit or tag -> path -> bytes
        self.closed = {}  # repository -> code of the error that readers without the token get
        self.requests: list[tuple[str, str]] = []  # method and path, in order
        self.half = lambda path: None  # called with the path of a file when half of it is sent
        self.private = {}  # repository -> whether it was made private
        self.tokens: set[str | None] = set()
        self.commits = []  # paths, in order
        self.delay = 0.0  # seconds that a commit takes
        self.refuses = lambda path: False  # whether the commit of a path fails
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                path = unquote(self.path.partition("?")[0])
                if path != "/api/agent-harnesses":  # which the client asks for once, in some environments
                    hub.requests.append((self.command, path))
                start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
                self._answer(hub.get(path, self.headers.get("Authorization")), start, path)

            do_HEAD = do_GET

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._answer(hub.post(unquote(self.path.partition("?")[0]), body))

            def _answer(self, answer, start=0, path=""):
                hub.tokens.add(self.headers.get("Authorization"))
                status, headers, content = answer
                if start:  # the rest of a file
                    headers = headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
                    status, content = 206, content[start:]
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT, **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content[: len(content) // 2])
                    self.wfile.flush()
                    hub.half(path)
                    self.wfile.write(content[len(content) // 2 :])

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def put(self, repository, folder, *paths):
        """Publish the files of a folder, or those of some paths in it, as the main branch; return the commit."""
        if repository in self.files:
            self.former[repository, self.commit_of(repository)] = self.files[repository]
        found = [folder / path for path in paths] if paths else [path for path in folder.rglob("*") if path.is_file()]
        self.files[repository] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}
        return self.commit_of(repository)

    def commit_of(self, repository):
        """Return the commit of the main branch."""
        return commit_of(self.files[repository])

    def asked(self):
        """Return the requests since the last call, and the paths of the files that were downloaded."""
        requests, self.requests = self.requests, []
        files = [
            path.split("/resolve/")[1].partition("/")[2]
            for how, path in requests
            if how == "GET" and "/resolve/" in path
        ]
        return requests, files

    def get(self, path, token=None):
        found = re.fullmatch(r"/api/(?:model|dataset|space)s/([^/]+/[^/]+)(?:/revision/(.+)|/(auth-check))?", path)
        where = found or re.fullmatch(r"/(?:datasets/|spaces/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not where:
            return 404, {}, b""
        repository, revision, name = where.groups()
        if repository not in self.files:
            return missing("RepoNotFound")
        error = None if token else self.closed.get(repository)
        if error == "RepoNotFound" or (error and (name or not found)):  # anybody may see what is in a gated one
            return 403 if error == "GatedRepo" else 401, {"X-Error-Code": error}, b"{}"
        files = self._at(repository, revision or "main")
        if files is None:
            return missing("RevisionNotFound")
        if not found:
            if name not in files:
                return missing("EntryNotFound")
            headers = {"ETag": f'"{digest(files[name])}"', "X-Repo-Commit": commit_of(files)}
            return 200, headers, files[name]
        siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
        facts = {"private": self.private.get(repository, False), "gated": "auto" if error == "GatedRepo" else False}
        return reply({"id": repository, "sha": commit_of(files), "siblings": siblings, **facts})

    def _at(self, repository, revision):
        current = self.files[repository]
        return current if revision in ("main", commit_of(current)) else self.former.get((repository, revision))

    def post(self, path, body):
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            self.files.setdefault(name, {})
            self.private[name] = wanted.get("visibility") == "private" or wanted.get("private", False)
            return reply({"url": f"{self.url}/{name}"})
        found = re.fullmatch(r"/api/(\w+)s/([^/]+/[^/]+)/(preupload|commit)/main", path)
        assert found
        _, repository, action = found.groups()
        if action == "preupload":
            names = [entry["path"] for entry in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            return reply({"files": [{"path": name, **plain} for name in names]})
        time.sleep(self.delay)
        entries = [entry["value"] for entry in map(json.loads, body.splitlines()) if entry["key"] == "file"]
        if any(self.refuses(entry["path"]) for entry in entries):
            return 403, {"X-Error-Message": "You may not write here."}, b"{}"
        for entry in entries:
            self.files[repository][entry["path"]] = base64.b64decode(entry["content"])
            self.commits.append(entry["path"])
        return reply({"success": True, "commitOid": COMMIT, "commitUrl": f"{self.url}/{repository}/commit/{COMMIT}"})


@functools.lru_cache(64)
def digest(content):
    """Return the hash of a file."""
    return hashlib.sha1(content).hexdigest()


def commit_of(files):
    """Return the commit of files by their content; that of a repository for uploads is `COMMIT`."""
    names = "".join(f"{path}{digest(content)}" for path, content in sorted(files.items()))
    return hashlib.sha1(names.encode()).hexdigest()


def reply(value):
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def missing(code):
    return 404, {"X-Error-Code": code}, b"{}"
