"""A server that speaks the part of the Hub's HTTP API that huggingface_hub calls to push and to load models.

Covered: creating repos and branches, the checks before a commit (`.gitignore` and unchanged files among them), commits of
small files, Git LFS for the rest, listing, downloading with ETags, tokens, private repos, and errors on demand. Not covered:
the Xet protocol (clients need `HF_HUB_DISABLE_XET=1`), pull requests, multi-part LFS.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKENS = {"hf_me": "me", "hf_other": "other"}


class Refused(Exception):
    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.code = status, code


class HubServer(ThreadingHTTPServer):
    """
    Attributes:
        repos (`dict`): By full name: `private` and `branches`, each a list of commits: `oid`, `message`, `files` by path.
        requests (`list`): `(method, path, user)` of every request.
        faults (`list`): `(method, pattern of the path, status)` that are refused.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.requests, self.faults, self.lfs = {}, [], [], {}
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        with contextlib.suppress(ConnectionError):
            super().handle_error(request, client_address)

    def files(self, repo_id, revision="main"):
        """Content by path."""
        return self.repos[repo_id]["branches"][revision][-1]["files"]

    def messages(self, repo_id, revision="main"):
        return [commit["message"] for commit in self.repos[repo_id]["branches"][revision]]

    def commit(self, repo_id, branch, message, files):
        commits = self.repos[repo_id]["branches"][branch]
        parent = commits[-1]["oid"] if commits else ""
        oid = hashlib.sha1(f"{repo_id} {branch} {parent} {message} {len(commits)}".encode()).hexdigest()
        commits.append({"oid": oid, "message": message, "files": files})
        return oid


def is_lfs(path):
    return path.endswith((".safetensors", ".bin", ".pt"))


def blob_id(path, content):
    """The Hub's name of a file: the sha256 of its content for LFS, else Git's hash."""
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_ignored(path, gitignore):
    """The lines of a `.gitignore` that are used here: a folder at the root, or a file's name."""
    lines = [line.strip() for line in gitignore.splitlines() if line.strip() and not line.startswith("#")]
    return any(
        path.startswith(line[1:]) if line.startswith("/") else fnmatch(path.rpartition("/")[2], line) for line in lines
    )


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: apart, each answer waits for an acknowledgement

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b""
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.body = self.rfile.read(length)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.user = TOKENS.get(token)
        hub = self.server
        hub.requests.append((self.command, path, self.user))
        try:
            with hub.lock:
                for method, pattern, status in hub.faults:
                    if method == self.command and re.search(pattern, path):
                        raise Refused(status, "refused on demand")
                for (method, pattern), handle in ROUTES.items():
                    match = re.fullmatch(pattern, path)
                    if match and self.command in method.split():
                        return handle(self, **match.groupdict())
                raise Refused(404, f"no route for {self.command} {path}")
        except Refused as refused:
            headers = {"X-Error-Message": str(refused), **({"X-Error-Code": refused.code} if refused.code else {})}
            self._send(json.dumps({"error": str(refused)}).encode(), refused.status, headers)

    def _send(self, content=b"", status=200, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value, status=200, **headers):
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers})

    def _repo(self, repo, write=False):
        found = self.server.repos.get(repo)
        if found is None or (found["private"] and self.user != repo.split("/")[0]):
            raise Refused(401, "Repository not found", "RepoNotFound")
        if write and self.user != repo.split("/")[0]:
            raise Refused(403, "You have no write access")
        return found

    def _commit(self, repo, revision):
        branches = self._repo(repo)["branches"]
        if branches.get(revision):
            return branches[revision][-1]
        for commits in branches.values():
            for commit in commits:
                if commit["oid"] == revision:
                    return commit
        raise Refused(404, "Revision not found", "RevisionNotFound")

    # --- What there is to ask for ---

    def whoami(self):
        if self.user is None:
            raise Refused(401, "Invalid token")
        self._json({"name": self.user, "type": "user", "orgs": []})

    def create_repo(self):
        request = json.loads(self.body)
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        owner = request.get("organization") or self.user
        repo = f"{owner}/{request['name']}"
        if owner != self.user:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        exists = repo in self.server.repos
        if not exists:
            self.server.repos[repo] = {"private": request.get("visibility") == "private", "branches": {"main": []}}
            self.server.commit(repo, "main", "initial commit", {".gitattributes": b"*.bin filter=lfs\n"})
        self._json({"url": f"{self.server.url}/{repo}", "name": repo}, 409 if exists else 200)

    def create_branch(self, repo, revision):
        branches = self._repo(repo, write=True)["branches"]
        exists = revision in branches
        branches.setdefault(revision, list(branches["main"]))
        self._json({}, 409 if exists else 200)

    def validate_yaml(self):
        text = json.loads(self.body)["content"]
        metadata = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None
        errors = [] if isinstance(metadata, dict) else [{"message": "metadata is no mapping"}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, repo, revision):
        self._repo(repo, write=True)
        request, current = json.loads(self.body), self._commit(repo, revision)["files"]
        gitignore = request.get("gitIgnore", current.get(".gitignore", b"").decode())
        files = [
            {
                "path": path,
                "uploadMode": "lfs" if is_lfs(path) else "regular",
                "shouldIgnore": is_ignored(path, gitignore),
                "oid": blob_id(path, current[path]) if path in current else None,
            }
            for path in (file["path"] for file in request["files"])
        ]
        self._json({"files": files})

    def lfs_batch(self, repo):
        self._repo(repo, write=True)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.server.lfs:
                item["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "The content is not what was announced")
        self.server.lfs[oid] = self.body
        self._send()

    def commit(self, repo, revision):
        self._repo(repo, write=True)
        files, message = dict(self._commit(repo, revision)["files"]), None
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.server.lfs[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        oid = self.server.commit(repo, revision, message, files)
        self._json({"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def info(self, repo, revision="main"):
        commit = self._commit(repo, revision)
        siblings = [{"rfilename": path} for path in commit["files"]]
        self._json({"id": repo, "sha": commit["oid"], "siblings": siblings, "tags": []})

    def tree(self, repo, revision, folder=""):
        files = self._commit(repo, revision)["files"]
        rows = []
        for path, content in files.items():
            if folder and not path.startswith(f"{folder}/"):
                continue
            row = {"type": "file", "path": path, "size": len(content), "oid": blob_id(path, content)}
            if is_lfs(path):
                row["lfs"] = {"oid": row["oid"], "size": len(content), "pointerSize": 130}
            rows.append(row)
        if folder and not rows:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        self._json(rows)

    def resolve(self, repo, revision, path):
        commit = self._commit(repo, revision)
        if path not in commit["files"]:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit["oid"]}
            return self._send(b"Entry not found", 404, headers)
        content = commit["files"][path]
        if self.command == "HEAD":
            etag = f'"{blob_id(path, content)}"'
            return self._send(content, headers={"X-Repo-Commit": commit["oid"], "ETag": etag})
        self._send(content, headers={"X-Repo-Commit": commit["oid"]})


_REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = {
    ("GET", "/api/whoami-v2"): Handler.whoami,
    ("POST", "/api/repos/create"): Handler.create_repo,
    ("POST", "/api/validate-yaml"): Handler.validate_yaml,
    ("POST", rf"/api/models/{_REPO}/branch/(?P<revision>.+)"): Handler.create_branch,
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>.+)"): Handler.preupload,
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>.+)"): Handler.commit,
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch"): Handler.lfs_batch,
    ("PUT", r"/lfs/(?P<oid>\w+)"): Handler.lfs_upload,
    ("GET", rf"/api/models/{_REPO}"): Handler.info,
    ("GET", rf"/api/models/{_REPO}/revision/(?P<revision>.+)"): Handler.info,
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?"): Handler.tree,
    # There are no data sets, and a user may still ask for one
    ("HEAD GET", rf"(/datasets)?/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"): Handler.resolve,
}
