"""A Hub in this process: as many of its endpoints as an upload and a download take, with every file in memory."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit


class ToyHub(ThreadingHTTPServer):
    """
    `files[repo_id][path]` is what was uploaded, in one commit or several; `requests` every (method, path). Use it as a
    context manager.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        self.cards: list[str] = []
        self.private: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "ToyHub":
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *args) -> None:
        self.shutdown()
        self.server_close()

    def commit_of(self, repo_id: str) -> str:
        digest = hashlib.sha1()
        for path, content in sorted(self.files[repo_id].items()):
            digest.update(path.encode() + hashlib.sha1(content).digest())
        return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int = 200, body: object = None, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def route(self) -> list[str]:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        return path.strip("/").split("/")

    def do_POST(self) -> None:  # noqa: N802
        parts = self.route()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub = self.server
        if parts[:3] == ["api", "repos", "create"]:
            request = json.loads(body)
            repo_id = f"{request.get('organization') or 'toy'}/{request['name']}"
            if repo_id not in hub.files and request.get("visibility") == "private":
                hub.private.add(repo_id)
            hub.files.setdefault(repo_id, {})
            self.answer(body={"url": f"{hub.url}/{repo_id}", "name": repo_id})
        elif parts[:2] == ["api", "validate-yaml"]:
            hub.cards.append(json.loads(body)["content"])
            self.answer(body={"errors": [], "warnings": []})
        elif parts[4] == "preupload":  # every file comes inside the commit itself
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.answer(body={"files": files})
        elif parts[4] == "commit":
            repo_id = "/".join(parts[2:4])
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    hub.files[repo_id][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            commit = hub.commit_of(repo_id)
            self.answer(body={"commitUrl": f"{hub.url}/{repo_id}/commit/{commit}", "commitOid": commit})
        else:
            self.answer(404, {"error": self.path})

    def do_GET(self) -> None:  # noqa: N802
        parts = self.route()
        hub = self.server
        repo_id = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repo_id not in hub.files:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif parts[0] == "api" and len(parts) > 4 and parts[4] == "tree":
            folder = "".join(f"{part}/" for part in parts[6:])
            files = [(name, content) for name, content in hub.files[repo_id].items() if name.startswith(folder)]
            tree = [{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in files]
            if tree:
                self.answer(body=tree)
            else:
                self.answer(404, {"error": f"{folder} not found"}, X_Error_Code="EntryNotFound")
        elif parts[0] == "api":
            siblings = [{"rfilename": name} for name in hub.files[repo_id]]
            about = {"sha": hub.commit_of(repo_id), "siblings": siblings, "private": repo_id in hub.private}
            self.answer(body={"id": repo_id, **about})
        else:
            name, commit = "/".join(parts[4:]), hub.commit_of(repo_id)
            content = hub.files[repo_id].get(name)
            if content is None:
                self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            else:
                self.answer(body=content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit)

    do_HEAD = do_GET  # noqa: N815
