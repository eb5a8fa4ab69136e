"""Names on the Hub, against a stand-in for what its HTTP API answers: our side only (resolve, cache, revision).

Each case is a process of its own: huggingface_hub reads its settings when it is imported.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from squares_data import Recorded

from maps_ray.models.hub import HubError, local_copy

BASE = Path(__file__).parents[2] / "jobs" / "assets" / "tiny_base"
COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Hub(http.server.ThreadingHTTPServer):
    """Serves a data set, `team/squares`, with two revisions, of which `v1` has another README; and a model."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.root, self.asked = root, []  # type: ignore[var-annotated]
        self.roots = {"team/squares": root, "team/policy": BASE}

    def names(self, repository: str) -> list[str]:
        root = self.roots[repository]
        return [*sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()), "README.md"]

    def content(self, repository: str, commit: str, name: str) -> bytes | None:
        if name == "README.md":
            return b"first" if commit == COMMITS["v1"] else b"second"
        return (self.roots[repository] / name).read_bytes() if name in self.names(repository) else None


class _Answers(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[0] == "team":
            # Files of models have no prefix.
            parts.insert(0, "models")
        kind, repository = ("models", "team/policy") if "models" in parts[:2] else ("datasets", "team/squares")
        if parts[:4] == ["api", kind, *repository.split("/")] and len(parts) >= 5:
            commit = COMMITS.get(parts[5], parts[5] if parts[5] in COMMITS.values() else None)
            if commit is None:
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            names = self.server.names(repository)
            if parts[4] == "tree":
                tree = [
                    {
                        "type": "file",
                        "path": name,
                        "size": len(self.server.content(repository, commit, name) or b""),
                        "oid": "0" * 40,
                    }
                    for name in names
                ]
                return self.answer(200, json.dumps(tree).encode())
            info = {"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in names]}
            return self.answer(200, json.dumps(info).encode())
        if parts[:4] == [kind, *repository.split("/"), "resolve"]:
            commit = COMMITS.get(parts[4], parts[4])
            data = self.server.content(repository, commit, "/".join(parts[5:]))
            if data is not None:
                tag = hashlib.sha1(data).hexdigest()
                return self.answer(200, data, {"ETag": f'"{tag}"', "X-Repo-Commit": commit})
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(data)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub(squares: Recorded) -> Iterator[Hub]:
    with Hub(squares.root) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(hub: Hub, home: Path, code: str, **environment: str) -> str:
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "MAPS_RAY_CACHE": str(home / "index"),
    }
    program = f"from maps_ray.models.hub import HubError, local_copy\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | settings | environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_name_is_fetched_once_and_then_read_without_the_network(hub: Hub, squares: Recorded, tmp_path: Path) -> None:
    code = (
        "from maps_ray.data import Demonstrations\nfrom maps_ray.spec import DataSpec\n"
        "data = Demonstrations(DataSpec(path='hf://datasets/team/squares', chunk=4), use_proprio=True)\n"
        "print(list(data.statistics), len(data.samples('train')), data.samples('train')[5].images[0].shape)"
    )
    told = ask(hub, tmp_path, code)
    assert told.startswith("['squares']") and told.endswith("(32, 48, 3)")
    fetched = len(hub.asked)
    assert any(line.startswith("GET /datasets/team/squares/resolve/") for line in hub.asked)
    assert ask(hub, tmp_path, code, HF_HUB_OFFLINE="1") == told
    assert len(hub.asked) == fetched


def test_revisions_are_apart_and_a_folder_may_be_named(hub: Hub, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "for name in ('squares', 'squares@v1', 'squares@main'):\n"
        "    print(Path(local_copy(f'hf://datasets/team/{name}'), 'README.md').read_text())\n"
        "print(sorted(p.name for p in Path(local_copy('hf://datasets/team/squares@v1/meta')).iterdir()))"
    )
    lines = ask(hub, tmp_path, code).splitlines()
    assert lines[:3] == ["second", "first", "second"]
    assert "info.json" in lines[3]


def test_a_base_by_its_name(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("name: run\nmodel: {checkpoint: 'hf://team/policy@v1'}\ndata: {path: demos}\n")
    code = (
        "from maps_ray.models import describe\nfrom maps_ray.spec import dump, load_spec\n"
        f"spec = load_spec({str(tmp_path / 'spec.yaml')!r})\n"
        "info = describe(spec.model.checkpoint, num_images=2, use_proprio=True, chunk=8)\n"
        "print(info.path)\nprint(spec.model.absolute() == spec.model)\nprint(dump(spec))"
    )
    lines = ask(hub, tmp_path, code).splitlines()
    assert lines[0].endswith(f"models--team--policy/snapshots/{COMMITS['v1']}") and lines[1] == "True"
    assert "  checkpoint: hf://team/policy@v1" in lines
    # Commands hand a path on: one slash is left of two.
    code = "from maps_ray.models import checkpoint_folder\nprint(checkpoint_folder('hf:/team/policy@v1'))"
    assert ask(hub, tmp_path, code) == lines[0]


REFUSED = {
    "hf://datasets/team/circles": "the Hub has no such dataset, or it is private",
    "hf://team/circles": "the Hub has no such model, or it is private",
    "hf://datasets/team/squares@v9": "the dataset has no revision 'v9'",
    "hf://datasets/team/squares/nowhere": "the dataset has no folder 'nowhere'",
}


def test_what_cannot_be_had_is_said(hub: Hub, tmp_path: Path) -> None:
    code = (
        "for name in {names!r}:\n    try:\n        print(local_copy(name))\n"
        "    except HubError as error:\n        print(error)"
    )
    lines = ask(hub, tmp_path / "one", code.format(names=list(REFUSED))).splitlines()
    for (name, message), line in zip(REFUSED.items(), lines, strict=True):
        assert line.startswith(f"{name}: {message}")
    line = ask(hub, tmp_path / "other", code.format(names=["hf://datasets/team/squares"]), HF_HUB_OFFLINE="1")
    assert line.startswith("hf://datasets/team/squares: HF_HUB_OFFLINE is set and the cache has no copy")


@pytest.mark.parametrize("name", ["hf://", "hf://team/a b", "hf://datasets/team/../../etc"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(HubError, match="write it as hf://datasets/OWNER/NAME"):
        local_copy(name)


def test_other_paths_are_left_alone() -> None:
    assert local_copy("/data/demos") == "/data/demos" and local_copy("s3://bucket/demos") == "s3://bucket/demos"
