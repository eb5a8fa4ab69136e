"""A checkpoint counts when it is complete, and only then; a full disk leaves the earlier ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from safetensors import safe_open

from maps_ray.training.checkpoint import complete_checkpoints, newest_checkpoint, read_manifest, save_checkpoint
from maps_ray.training.run_faults import CheckpointError


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process only."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def write(folder: Path) -> list[Path]:
    path = folder / "rank-00000.bin"
    path.write_bytes(b"x" * 1000)
    return [path]


def save(root: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(root, step, write, {"position": step * 8}, keep)


def test_the_newest_are_kept(alone: None, tmp_path: Path) -> None:
    for step in (5, 10, 15):
        folder = save(tmp_path / "checkpoints", step)
    assert folder.name == "step-00000015"
    assert [path.name for path in complete_checkpoints(tmp_path / "checkpoints")] == ["step-00000015", "step-00000010"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000010", "step-00000015"]
    manifest = read_manifest(folder)
    assert manifest["step"] == 15 and manifest["position"] == 120 and manifest["world_size"] == 1
    assert manifest["files"] == {"rank-00000.bin": 1000}


def test_what_a_kill_leaves_behind_is_not_used(alone: None, tmp_path: Path) -> None:
    good, cut, without = (save(tmp_path, step, keep=9) for step in (5, 10, 15))
    (cut / "rank-00000.bin").write_bytes(b"x" * 999)
    (without / "manifest.json").unlink()
    (tmp_path / ".step-00000020.partial").mkdir()
    assert newest_checkpoint(tmp_path) == good
    # The run comes by the same steps again, over the remains.
    assert save(tmp_path, 20) == newest_checkpoint(tmp_path)
    assert save(tmp_path, 15).is_dir()


def test_none_yet(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "missing") is None


def test_another_format_is_refused(alone: None, tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="has format 99, this package reads 1"):
        read_manifest(folder)


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch, torch.distributed as dist
from safetensors.torch import save_file
from maps_ray.training.checkpoint import save_checkpoint
from maps_ray.training.run_faults import CheckpointError

root, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=2)

def write(folder):
    path = folder / f"rank-{rank}.safetensors"
    save_file({"weight": torch.ones(100_000)}, path)
    return [path]

save_checkpoint(root / "checkpoints", 5, write, {}, 2)
if rank == 1:
    # No file of this process may grow beyond 64 KiB: writing fails as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
try:
    save_checkpoint(root / "checkpoints", 10, write, {}, 2)
except CheckpointError as error:
    print(error)
# Neither leaves while the other still talks to it.
dist.barrier()
dist.destroy_process_group()
"""


def test_a_disk_that_fills_up_on_one_rank_stops_all_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-c", FULL_DISK, str(tmp_path), str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in ranks:
        message = process.communicate(timeout=120)[0]
        assert process.returncode == 0
        assert message.startswith("cannot write the checkpoint of step 10 under ")
        assert "(rank 1: " in message and "File too large" in message
        assert f"the last complete one stays: {tmp_path / 'checkpoints' / 'step-00000005'}" in message
        assert "Free some space" in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
    assert newest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-00000005"


KILLED = """
import json, os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from maps_ray.training.checkpoint import Saver
from maps_ray.training.state import Snapshot, State

class Filled(Snapshot):
    # Of a step, in place of an engine's state.
    def take(self, step):
        tensors = {f"weight/{n}": torch.full((400_000,), float(step)) for n in range(10)}
        return State(tensors, {"slices": [], "step": step})

def child(root):
    dist.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=0, world_size=1)
    saver = Saver(root / "checkpoints", keep=2)
    saver._snapshot = Filled()
    for step in range(1, 1000):
        saver.save(step, step, {})
        saver.wait()

for line in sys.stdin:
    root = Path(json.loads(line))
    root.mkdir()
    pid = os.fork()
    if not pid:
        child(root)
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("gone", flush=True)
"""


def moments(root: Path) -> dict[str, Callable[[], bool]]:
    """When to kill, once step 2 is complete: what the background write has just done."""

    def partial(name: str, least: int = 0) -> bool:
        found = [path for path in root.glob(f".step-*.partial/{name}") if path.parent.name[:14] > ".step-00000002"]
        return any(path.exists() and path.stat().st_size >= least for path in found)

    return {
        "folder made": lambda: any(path.name[:14] > ".step-00000002" for path in root.glob(".step-*.partial")),
        "file begun": lambda: partial("*.safetensors", 1),
        "file half written": lambda: partial("*.safetensors", 8_000_000),
        "manifest there": lambda: partial("manifest.json"),
        "renamed": lambda: (root / "step-00000003").exists(),
    }


def test_a_kill_during_the_background_write_leaves_the_last_complete_one(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdin and process.stdout
    seen = set()
    for name in moments(tmp_path):
        root = tmp_path / name.replace(" ", "-")
        process.stdin.write(json.dumps(str(root)) + "\n")
        pid = int(process.stdout.readline())
        checkpoints = root / "checkpoints"
        began, due = time.monotonic(), moments(checkpoints)[name]
        # keep = 2: the second one stays until the fourth.
        while not any((checkpoints / f"step-0000000{step}").exists() for step in (2, 3)):
            assert time.monotonic() < began + 200
        # A moment that is too short to be seen on a busy machine is as good as any other.
        while not due() and time.monotonic() < began + 30:
            pass
        os.kill(pid, signal.SIGKILL)
        assert process.stdout.readline() == "gone\n"
        newest = newest_checkpoint(checkpoints)
        assert newest is not None and newest.name >= "step-00000002"
        step = read_manifest(newest)["step"]
        with safe_open(newest / "rank-00000.safetensors", framework="pt") as file:
            names = list(file.keys())
            assert len(names) == 10 and all((file.get_tensor(name) == step).all() for name in names)
        seen |= {path.name.endswith(".partial") for path in checkpoints.iterdir()}
    # Some were killed in the middle of a write.
    assert True in seen
    process.stdin.close()
    assert process.wait(60) == 0


LATE = """
import os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from maps_ray.training.ranks import gloo_group, on_all_ranks

root, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=2)
gloo_group(timeout_s=2)
on_all_ranks(lambda: None)
if rank == 1:
    sys.stdin.read()
    os._exit(0)
began = time.monotonic()
try:
    on_all_ranks(lambda: None)
except RuntimeError as error:
    print(time.monotonic() - began, "imed out" in str(error), flush=True)
    os._exit(0)
"""


def test_ranks_wait_for_the_slowest_as_long_as_they_are_told(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LATE, str(tmp_path), str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    waited, timed_out = str(ranks[0].stdout and ranks[0].stdout.readline()).split()
    assert 1 < float(waited) < 60 and timed_out == "True"
    for process in ranks:
        process.communicate(timeout=60)
        assert process.returncode == 0
