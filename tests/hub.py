"""A server on this machine that plays the hub, and a process that downloads from it.

It takes pushes too. What it serves lies in a folder, `models/<name>/` and `datasets/<name>/`, and is had from
any owner. The owner's name says how it behaves: `fine`, `closed` (gated, what it says of itself is had), or
one of FAULTS. A repository has what `card.json` in its folder says as its card. An error's text repeats
what the client sent to authorise itself, as a careless server might.

    python -m tests.hub    # lines ["model" | "dataset", name] on stdin, ["" | what was said] on stdout
"""

import contextlib
import hashlib
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from lazyorpo_lib.errors import UserError

FAULTS = {
    "private": (401, "RepoNotFound"),
    "gated": (403, "GatedRepo"),
    "refused": (403, ""),
    "missing": (404, "RepoNotFound"),
    "busy": (429, ""),
    "broken": (500, ""),
    "slow": None,
    "cut": None,
}
COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.heard.append((self.path, body))
        if "/paths-info/" in self.path:
            return self._say(
                200, [entry for entry in self._tree() if entry["path"] in body.decode().replace("%2F", "/")]
            )
        if self.server.status != 200:
            return self._refuse(self.server.status, "")
        home = f"{self.server.url}/me/tuned"
        answer = {"url": home, "commitUrl": f"{home}/commit/1", "commitOid": "1"}
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
        self._say(200, answer | {"id": "me/tuned"})

    def do_GET(self):
        if self.server.away:
            self.close_connection = True
            return
        where = re.fullmatch(
            r"/(?:api/)?(models/|datasets/|)([\w-]+)/([\w-]+)(?:/(resolve|tree|revision)/[\w-]+/?(.*)|/auth-check)?",
            self.path.split("?")[0],
        )
        if not where or where[2] in ("me", "api"):
            return self._say(self.server.status, {"id": "me/tuned", "type": "user", "name": "me"})
        kind, self.owner, name, action, path = where.groups()
        self.home = Path(self.server.folder) / (kind or "models/") / name
        if self.owner == "closed" and action == "resolve" or "/auth-check" in self.path:
            return self._refuse(*FAULTS["gated"]) if self.owner == "closed" else self._say(200, {})
        if FAULTS.get(self.owner):
            return self._refuse(*FAULTS[self.owner])
        if self.owner == "slow":
            time.sleep(2.5)
        if not self.home.is_dir():
            return self._refuse(404, "RepoNotFound")
        if action == "resolve":
            return self._file(self.home / path)
        if action == "tree":
            return self._say(200, self._tree())
        self._say(
            200,
            {
                "id": f"{self.owner}/{name}",
                "sha": COMMIT,
                "gated": "manual" if self.owner == "closed" else False,
                "cardData": self._card(),
                "siblings": [{"rfilename": e["path"]} for e in self._tree()],
            },
        )

    do_HEAD = do_GET

    def _tree(self):
        if self.command == "POST":
            self.home = Path(self.server.folder) / re.search(
                r"(models|datasets)/[\w-]+/([\w-]+)", self.path
            ).expand(r"\1/\2")
        files = sorted(f for f in self.home.iterdir())
        return [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]

    def _card(self):
        card = self.home / "card.json"
        return json.loads(card.read_text()) if card.is_file() else None

    def _file(self, file):
        if not file.is_file():
            return self._refuse(404, "EntryNotFound")
        content, status = file.read_bytes(), 200
        headers = {
            "ETag": hashlib.sha256(content).hexdigest(),
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        if wanted := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(wanted[1])
            headers["Content-Range"], status = f"bytes {start}-{len(content) - 1}/{len(content)}", 206
            content = content[start:]
        self._head(status, headers | {"Content-Length": str(len(content))})
        if self.command == "HEAD":
            return
        if self.owner == "cut" and file.suffix in (
            ".safetensors",
            ".jsonl",
        ):  # the line goes dead half-way, every time
            self.wfile.write(b"" if wanted else content[: len(content) // 2])
            self.close_connection = True
            return
        self.wfile.write(content)

    def _refuse(self, status, code):
        text = f"refused: {self.headers.get('Authorization')}"
        self._say(
            status,
            {"error": text},
            {"X-Error-Code": code, "X-Error-Message": text} if code else {"X-Error-Message": text},
        )

    def _say(self, status, answer, headers=()):
        body = json.dumps(answer).encode()
        self._head(
            status, {"Content-Type": "application/json", "Content-Length": str(len(body))} | dict(headers)
        )
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve(folder="."):
    """The server; `url`, `heard` (path and body of every POST), and `status` of what it says to a push."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.away, server.folder, server.heard, server.status, server.url = (
        False,
        folder,
        [],
        200,
        f"http://127.0.0.1:{server.server_port}",
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.away = True  # also for the connections that are kept open
        server.shutdown()
        server.server_close()


def _download(what: str, name: str) -> str:
    """What is said to the user when this is fetched; empty if it could be."""
    from lazyorpo_lib import model
    from lazyorpo_lib.rows.dataset import open_rows

    try:
        if what == "dataset":
            assert sum(1 for _ in open_rows(name)) == 40
        else:
            model.load_config(name)
            model.load_tokenizer(name)
            model.load_base(name, dtype="float32", device="cpu")
    except UserError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    sleep, time.sleep = (
        time.sleep,
        lambda seconds: sleep(min(seconds, 0.02)),
    )  # clients wait long before they try again
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            said = _download(*json.loads(line))
        except BaseException as error:
            said = f"Traceback: {type(error).__name__}: {error}"
        print(json.dumps([said]), file=answers, flush=True)
