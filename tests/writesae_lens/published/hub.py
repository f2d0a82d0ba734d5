"""A Hugging Face Hub in memory, on this machine, and a process whose `huggingface_hub` speaks to it."""

from __future__ import annotations

import base64
import json
import os
import re
import select
import sys
import tempfile
import textwrap
import threading
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]
EMPTY = sha1().hexdigest()  # the commit that every repository begins with
VERBS = "revision|preupload|commit|branch"
MODEL = re.compile(rf"/api/models/([^/]+(?:/[^/]+)??)(?:/({VERBS})/([^/]+))?")
FILE = re.compile(r"/([^/]+(?:/[^/]+)?)/(resolve)/([^/]+)/(.+)")
GATES = {
    401: "You must have access to it and be authenticated to access it. Please log in.",
    403: "You are not in the authorized list. Visit https://huggingface.co/ to ask for access.",
}


class Refused(Exception):
    """Status, the code by which the client chooses its exception, message, and more headers if any."""


@dataclass
class Repo:
    """Commits, each with all its files, and the branches and tags that name them."""

    private: bool = False
    gate: int = 0
    commits: dict[str, Files] = field(default_factory=lambda: {EMPTY: {}})
    names: dict[str, str] = field(default_factory=lambda: {"main": EMPTY})

    def commit(self, branch: str, files: Files) -> str:
        hashes = [(path, sha256(data).hexdigest()) for path, data in sorted(files.items())]
        commit = sha1(repr((self.names[branch], hashes)).encode()).hexdigest()
        self.commits[commit], self.names[branch] = files, commit
        return commit

    def find(self, revision: str) -> str:
        if (commit := self.names.get(revision, revision)) not in self.commits:
            raise Refused(404, "RevisionNotFound", "Invalid rev id")
        return commit


class Hub(ThreadingHTTPServer):
    """Repositories by name, and what was asked: `requests` (method, path) and `ranges` (path, Range)."""

    request_queue_size = 64  # a full queue costs a client with many threads a second

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[tuple[str, str]] = []
        self.interruptions: dict[str, tuple[int, int]] = {}
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def server_close(self) -> None:
        self.shutdown()
        super().server_close()

    def put(self, repo: str, path: str | Files, data: bytes = b"", revision: str = "main") -> str:
        """Commit a file, or several; a repository or branch that is not there yet is made."""
        there, new = self.repos.setdefault(repo, Repo()), path if isinstance(path, dict) else {path: data}
        there.names.setdefault(revision, there.names["main"])
        return there.commit(revision, self.files(repo, revision) | new)

    def tag(self, repo: str, name: str) -> None:
        self.repos[repo].names[name] = self.repos[repo].find("main")

    def files(self, repo: str, revision: str = "main") -> Files:
        return dict(self.repos[repo].commits[self.repos[repo].find(revision)])

    def gate(self, repo: str, status: int) -> None:
        """Refuse files, but not metadata: 401 to who has no token, 403 to the others too, 0 to nobody."""
        self.repos[repo].gate = status

    def interrupt(self, path: str, after: int, times: int) -> None:
        """Break the next answers with this file after so many bytes of theirs, and before the last."""
        self.interruptions[path] = (after, times)


class Answer(BaseHTTPRequestHandler):
    """One request on a connection of its own (HTTP/1.0), so that a closed hub answers no more."""

    def log_message(self, *arguments: object) -> None: ...

    def answer(self, body: Any, status: int = 200, cut: int | None = None, **headers: str) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body[:cut])

    def do_GET(self) -> None:
        self.server.requests.append((self.command, self.path))
        path, data = urlsplit(self.path).path, self.rfile.read(int(self.headers["Content-Length"] or 0))
        try:
            if not (match := MODEL.fullmatch(path) or FILE.fullmatch(path)):
                return self.answer(*self.other(path, data))
            name, verb, *rest = (unquote(part or "") for part in match.groups())
            repo = self.server.repos.get(name)
            if repo is None or (repo.private and not self.headers["Authorization"]):
                raise Refused(404, "RepoNotFound", "Repository not found")
            if verb == "resolve":
                return self.file(repo, name, *rest)
            return self.answer(self.model(repo, name, verb, *rest, data))
        except Refused as refused:
            status, code, message, *more = refused.args
            headers = {"X-Error-Code": code, "X-Error-Message": message}
            return self.answer({"error": message}, status, **headers, **dict(*more))

    do_HEAD = do_POST = do_GET

    def file(self, repo: Repo, name: str, revision: str, path: str) -> None:
        refusal = 403 if self.headers["Authorization"] else 401
        if repo.gate >= refusal:
            raise Refused(refusal, "GatedRepo", f"Access to model {name} is restricted. {GATES[refusal]}")
        commit, status, cut = repo.find(revision), 200, None
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if (data := repo.commits[commit].get(path)) is None:
            raise Refused(404, "EntryNotFound", "Entry not found", headers)
        headers["ETag"] = f'"{sha256(data).hexdigest()}"'
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or ""):
            self.server.ranges.append((path, asked[0]))
            first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        after, times = self.server.interruptions.get(path, (0, 0))
        if self.command == "GET" and times:
            self.server.interruptions[path] = (after, times - 1)
            cut = min(after, len(data) - 1)
        self.answer(data, status, cut, **headers)

    def model(self, repo: Repo, name: str, verb: str, revision: str, data: bytes) -> Any:
        if verb == "branch":
            if revision in repo.names:
                raise Refused(409, "", "Reference already exists")
            repo.names[revision] = repo.find(json.loads(data).get("startingPoint", "main"))
            return {}
        commit = repo.find(revision or "main")
        files = dict(repo.commits[commit])
        if verb == "preupload":
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            asked = [file["path"] for file in json.loads(data)["files"]]
            # By the oid the client leaves out of its commit what is there already.
            oids = {file: sha1(b"blob %d\0" % len(x) + x).hexdigest() for file, x in files.items()}
            return {"files": [plain | {"path": file, "oid": oids.get(file)} for file in asked]}
        if verb == "commit":
            for change in map(json.loads, data.splitlines()):
                key, value = change["key"], change["value"]
                if key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key != "header":
                    raise Refused(404, "EntryNotFound", f"Cannot commit {value}")
            commit = repo.commit(revision, files)
            return {"commitOid": commit, "commitUrl": f"{self.server.endpoint}/{name}/commit/{commit}"}
        siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
        state = {"private": repo.private, "gated": "manual" if repo.gate else False, "tags": []}
        return {"id": name, "sha": commit, "siblings": siblings, **state}

    def other(self, path: str, data: bytes) -> tuple[Any, int]:
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}, 200
        if path != "/api/repos/create":
            raise Refused(404, "", "Not found")
        asked = json.loads(data)
        name = f"{asked['organization'] or 'user'}/{asked['name']}"
        new = Repo(asked.get("visibility") == "private" or asked.get("private", False))
        status = 200 if self.server.repos.setdefault(name, new) is new else 409
        return {"url": f"{self.server.endpoint}/{name}"}, status  # with exist_ok, read at 409 too


LOOP = """
import json, os, sys, traceback, types
asked, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(2, 1)
sys.modules["client"] = client = types.ModuleType("client")
for line in asked:
    request, client.result = json.loads(line), None
    vars(client).update(request["values"])
    try:
        exec(compile(request["code"], "<client>", "exec"), vars(client))
        answer = json.dumps({"result": client.result, "error": None})
    except BaseException as error:
        mro = [kind.__name__ for kind in type(error).__mro__]
        told = {"error": f"{mro[0]}: {error}", "mro": mro, "traceback": traceback.format_exc()}
        answer = json.dumps(told)
    print(answer, file=answers, flush=True)
"""


class RemoteError(Exception):
    """What the client's code raised: its class and those above it (`kind`, `mro`), message, traceback."""

    def __init__(self, error: str, mro: list[str], traceback: str) -> None:
        super().__init__(f"{error}\n\n{traceback}")
        self.kind, self.mro, self.traceback = mro[0], mro, traceback
        self.message = error.removeprefix(f"{self.kind}: ")


class Client(AbstractContextManager):
    """A process that knows no hub but this one and runs code for many tests, its imports paid once."""

    def __init__(self, hub: Hub | str, cache: Path, preload: str = "", timeout: float = 120, **env: str):
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_")
        ours = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        ours |= {"HF_ENDPOINT": getattr(hub, "endpoint", hub), "HF_HOME": str(cache)}
        ours |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_ETAG_TIMEOUT": "5"}
        ours |= {"HF_HUB_DOWNLOAD_TIMEOUT": "5", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        ours |= {"PYTHONPATH": str(Path(__file__).parents[3])}
        cache.mkdir(parents=True, exist_ok=True)
        self.timeout, self.log = timeout, tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, "-u", "-c", LOOP]
        pipes = {"stdin": PIPE, "stdout": PIPE, "stderr": self.log, "text": True}
        self.process = Popen(command, **pipes, cwd=cache, env=ours | env)
        self.run(preload)

    @property
    def stderr(self) -> str:
        """The end of what was printed and logged."""
        end = os.fstat(self.log.fileno()).st_size
        return os.pread(self.log.fileno(), 9999, max(0, end - 9999)).decode(errors="replace")

    def run(self, code: str, /, **values: Any) -> Any:
        """What the code, which finds these values as its variables, leaves in `result`."""
        request = json.dumps({"code": textwrap.dedent(code), "values": values})
        with suppress(BrokenPipeError):
            print(request, file=self.process.stdin, flush=True)
        if not select.select([self.process.stdout], [], [], self.timeout)[0]:
            self.process.kill()
            raise TimeoutError(f"no answer in {self.timeout} s\n{self.stderr}")
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"the client is dead: {self.process.wait()}\n{self.stderr}")
        answer = json.loads(line)
        if answer["error"]:
            raise RemoteError(**answer)
        return answer["result"]

    def __exit__(self, *error: object) -> None:
        with suppress(TimeoutExpired):
            self.process.communicate(timeout=10)  # at the end of its input it leaves
        self.process.kill()
        self.process.wait()

    close = __exit__
