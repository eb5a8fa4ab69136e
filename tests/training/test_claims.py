"""Two drivers on one run, each a process: the older one stops at its next commit, and what it commits is not used."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_gate import s3_server

from maps_ray.run_storage import RunStorage
from maps_ray.training.claims import Claim, Fence
from maps_ray.training.shelf import FolderShelf, ObjectShelf, Shelf, newest

DRIVER = """
import sys
from pathlib import Path
import torch.distributed as dist
from maps_ray.run_storage import RunStorage
from maps_ray.training.checkpoint import save_checkpoint
from maps_ray.training.claims import Fence
from maps_ray.training.run_faults import OvertakenError
from maps_ray.training.shelf import FolderShelf, ObjectShelf, newest, step_of

own, runs = Path(sys.argv[1]), []
dist.init_process_group("gloo", init_method=f"file://{own}/rendezvous", rank=0, world_size=1)

def shelf(where, fence):
    if "://" in where:
        return ObjectShelf(RunStorage(where), own / "work", fence)
    return FolderShelf(Path(where) / "checkpoints", fence)

def write(folder):
    (folder / "rank-00000.bin").write_text(str(own))
    return [folder / "rank-00000.bin"]

def answer(where, fence, what, step):
    if what == "late":
        # Held up between its look at the claims and its commit.
        fence.fault = lambda: None
    try:
        save_checkpoint(shelf(where, fence), int(step), write, {}, 9, fence=fence)
        return f"saved {step}"
    except OvertakenError as error:
        return f"overtaken: {error}"

for where in sys.argv[2:]:
    before = Fence.earlier(Path(where), RunStorage(where) if "://" in where else None)
    last = newest(shelf(where, before))
    runs.append((where, before.claim(step_of(last) if last else 0)))
    print(f"claimed at {last}", flush=True)
for line in sys.stdin:
    for where, fence in runs:
        print(answer(where, fence, *line.split()), flush=True)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with s3_server("runs") as (_, client):
        yield client


class Driver:
    """A process that is the driver of two runs, in a folder and on an object store, and answers for both."""

    def __init__(self, own: Path, *places: str) -> None:
        own.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(own), *places], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.claimed = self.hear()

    def hear(self) -> list[str]:
        assert self.process.stdout is not None
        return [self.process.stdout.readline().strip() for _ in range(2)]

    def ask(self, what: str, step: int) -> list[str]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what} {step}\n")
        self.process.stdin.flush()
        return self.hear()

    def end(self) -> None:
        self.process.communicate(timeout=30)


def shelves(tmp_path: Path) -> list[Shelf]:
    """What counts now, as the next driver sees it."""
    folder, storage = tmp_path / "run", RunStorage("s3://runs/run")
    return [
        FolderShelf(folder / "checkpoints", Fence.earlier(folder, None)),
        ObjectShelf(storage, tmp_path / "work", Fence.earlier(folder, storage)),
    ]


def test_the_older_driver_stops_at_its_next_commit(server: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    places = (str(tmp_path / "run"), "s3://runs/run")
    first = Driver(tmp_path / "first", *places)
    assert first.claimed == ["claimed at None"] * 2 and first.ask("save", 5) == ["saved 5"] * 2
    second = Driver(tmp_path / "second", *places)
    assert second.claimed == ["claimed at step-00000005"] * 2
    for said in first.ask("save", 10):
        assert said.startswith(f"overtaken: the run belongs to another driver: process {second.process.pid} on ")
        assert said.endswith(
            "this driver stops, and what it has done since its last checkpoint is left to the other one"
        )
    assert second.ask("save", 10) == ["saved 10"] * 2 and second.ask("save", 15) == ["saved 15"] * 2
    # Its commit comes too late, and after the other one's: it is there, and does not count.
    assert first.ask("late", 20) == ["saved 20"] * 2
    for shelf in shelves(tmp_path):
        assert shelf.complete() == ["step-00000015", "step-00000010", "step-00000005"]
        with shelf.open("step-00000010") as path_of:
            (name,) = shelf.manifest("step-00000010")["files"]
            assert path_of(name).read_text() == str(tmp_path / "second")
    # A third driver goes on from what counts, and comes by the late step itself.
    third = Driver(tmp_path / "third", *places)
    assert third.claimed == ["claimed at step-00000015"] * 2 and third.ask("save", 20) == ["saved 20"] * 2
    assert all(said.startswith("overtaken: ") for said in second.ask("save", 25))
    for driver in (first, second, third):
        driver.end()
    assert [newest(shelf) for shelf in shelves(tmp_path)] == ["step-00000020"] * 2


def test_an_older_list_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another node's copy of a shared folder's file may lag: nobody is overtaken by a driver before him."""
    monkeypatch.setattr("maps_ray.training.claims.LAG_S", 0.3)
    monkeypatch.setattr("maps_ray.training.claims._LOOK_S", 0.1)
    earlier = Fence.earlier(tmp_path, None).claim(0)
    fence = Fence.earlier(tmp_path, None).claim(5)
    assert fence.fault() is None and str(earlier.fault()).startswith("the run belongs to another driver: process")
    path = tmp_path / "claims.json"
    claims = json.loads(path.read_text())
    path.write_text(json.dumps(claims[:1]))
    assert "does not name this driver any more" in str(fence.fault())
    path.write_text(json.dumps(claims))
    assert Fence(tmp_path, None, fence.claims).fault() is None


def test_what_counts() -> None:
    claims = [Claim(token, "host", 1, 0.0, step) for token, step in (("a", 0), ("b", 10), ("c", 25))]
    fence = Fence(Path("unused"), None, claims)
    assert [fence.accepts("a", step) for step in (5, 10, 15)] == [True, True, False]
    assert [fence.accepts("b", step) for step in (15, 25, 30)] == [True, True, False]
    assert fence.accepts("c", 1000) and not fence.accepts("unknown", 5)
    # Of a run that began before there were claims.
    assert not fence.accepts(None, 5) and Fence(Path("unused"), None, claims[1:2]).accepts(None, 10)
    assert Fence(Path("unused"), None, []).accepts(None, 10)


def test_a_node_that_does_not_see_the_folder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maps_ray.training.claims.LAG_S", 1.2)
    driver, elsewhere = tmp_path / "driver", tmp_path / "elsewhere"
    driver.mkdir()
    elsewhere.mkdir()
    own = Fence.earlier(driver, None).claim(0)
    assert own.unseen() is None
    # What an earlier run of that name has left on the node's own disk is not the driver's.
    Fence.earlier(elsewhere, None).claim(0)
    own = Fence.earlier(driver, None).claim(5)
    assert Fence(driver, None, own.claims).unseen() is None
    for folder in (elsewhere, tmp_path / "nowhere"):
        found = Fence(folder, None, own.claims).unseen()
        assert found is not None and f"does not see what the driver has written to {folder}: cluster.storage" in found
    (tmp_path / "file").touch()
    assert "(Not a directory)" in str(Fence(tmp_path / "file", None, own.claims).unseen())
    # Late, as on NFS, and then taken over: not this method's to say.
    monkeypatch.setattr("maps_ray.training.claims.LAG_S", 20.0)
    late = Fence(tmp_path / "late", None, own.claims)
    (tmp_path / "late").mkdir()
    threading.Timer(1.0, lambda: Fence(tmp_path / "late", None, own.claims).claim(7)).start()
    assert late.unseen() is None and late.fault() is not None
