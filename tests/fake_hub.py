"""A hub on this machine: as much of the HTTP interface as uploads and downloads need."""

from __future__ import annotations

import base64
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
        self.files = {}  # repository -> path -> bytes
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
                self._answer(hub.get(unquote(self.path.partition("?")[0])))

            do_HEAD = do_GET

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._answer(hub.post(unquote(self.path.partition("?")[0]), body))

            def _answer(self, answer):
                hub.tokens.add(self.headers.get("Authorization"))
                status, headers, content = answer
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT, **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def get(self, path):
        if found := re.fullmatch(r"/api/(?:model|dataset|space)s/([^/]+/[^/]+)", path):
            if found[1] not in self.files:
                return missing("RepoNotFound")
            return reply({"id": found[1], "sha": COMMIT, "private": self.private.get(found[1], False), "siblings": []})
        if found := re.fullmatch(r"/(?:datasets/|spaces/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            content = self.files.get(found[1], {}).get(found[2])
            if content is None:
                return missing("EntryNotFound" if found[1] in self.files else "RepoNotFound")
            return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content
        return 404, {}, b""

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


def reply(value):
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def missing(code):
    return 404, {"X-Error-Code": code}, b"{}"
