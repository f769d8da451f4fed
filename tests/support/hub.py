"""A hub on loopback that serves folders as repositories: as much of the hub's interface as its client uses to read.

So the real code for hub ids (resolving, listing, downloading, streaming) runs in tests, without a network.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: dict[str, Path] = {}  # "models/OWNER/NAME" or "datasets/OWNER/NAME" -> folder  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.asked.append(f"{self.command} {self.path}")
        path, _, query = self.path.partition("?")
        for name, folder in self.repositories.items():
            files = {str(f.relative_to(folder)): f for f in sorted(folder.rglob("*")) if f.is_file()}
            kind, _, short = name.partition("/")
            if re.fullmatch(rf"/api/{name}(/revision/(main|{COMMIT}))?", path):
                return self.reply(self.about(short, files))
            if listing := re.fullmatch(rf"/api/{name}/tree/[^/]+(/.*)?", path):
                return self.reply(self.tree(files, (listing[1] or "").strip("/"), "recursive=true" in query.lower()))
            prefix = f"/{name}" if kind == "datasets" else f"/{short}"
            if (wanted := re.fullmatch(rf"{prefix}/resolve/[^/]+/(.+)", path)) and wanted[1] in files:
                return self.content(files[wanted[1]].read_bytes())
        code = "EntryNotFound" if "/resolve/" in path else "RepoNotFound"
        return self.reply({"error": code}, 404, X_Error_Code=code)

    def about(self, name, files):
        when = "2026-01-01T00:00:00.000Z"
        about = {"id": name, "modelId": name, "_id": "1", "sha": COMMIT, "lastModified": when, "createdAt": when}
        known = {"private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
        return about | known | {"siblings": [{"rfilename": file} for file in files]}

    def tree(self, files, base, recursive):
        start = len(base) + 1 if base else 0
        inside = [file for file in files if not base or file.startswith(f"{base}/")]
        folders = sorted({file[:start] + file[start:].split("/")[0] for file in inside if "/" in file[start:]})
        found = [
            {"type": "file", "path": f, "size": files[f].stat().st_size, "oid": hashlib.sha1(f.encode()).hexdigest()}
            for f in inside
            if recursive or "/" not in f[start:]
        ]
        return found + [{"type": "directory", "path": folder, "size": 0, "oid": "d" * 40} for folder in folders]

    def content(self, data):
        head = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self.send(data, 200, **head)
        first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        return self.send(data[first : last + 1], 206, Content_Range=f"bytes {first}-{last}/{len(data)}", **head)

    def reply(self, found, code=200, **head):
        self.send(json.dumps(found).encode(), code, Content_Type="application/json", X_Repo_Commit=COMMIT, **head)

    def send(self, data, code, **head):
        self.send_response(code)
        for name, value in head.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Its address, and what it was asked so far."""
    handler = type("Served", (Handler,), {"repositories": repositories, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
    finally:
        server.shutdown()
        server.server_close()
