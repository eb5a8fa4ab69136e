"""Real loader processes over the squares data set."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from squares_data import Recorded

from maps_ray.data import Batches, DatasetError, Demonstrations, EvaluationBatches, Loader, Mixture, loader_processes
from maps_ray.spec import DataSpec

CPU = torch.device("cpu")


class Tensors:
    """A processor of plain tensors."""

    def encode(
        self, instruction: str, images: Sequence[np.ndarray], proprio: np.ndarray | None, actions: np.ndarray | None
    ) -> dict[str, torch.Tensor]:
        pixels = torch.from_numpy(np.stack(images))
        return {"pixels": pixels, "actions": torch.from_numpy(np.asarray(actions))}

    def collate(self, samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        return batch | {"attention_mask": torch.ones(len(samples), 1, dtype=torch.bool)}


@pytest.fixture(scope="module")
def train(squares: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    spec = DataSpec(path=squares.root, chunk=4, cache={"folder": tmp_path_factory.mktemp("index")})
    return Demonstrations(spec, use_proprio=True).samples("train")


def batches(train: Mixture) -> Batches:
    return Batches(train, Tensors(), seed=3, global_batch_size=12, micro_batches=2, augment=True)


def test_processes_change_nothing_and_end_with_the_loader(train: Mixture) -> None:
    expected = [batches(train).batch(step, micro) for step in range(3, 6) for micro in range(2)]
    before = torch.get_rng_state()
    for processes in (0, 2):
        with Loader(batches(train), 3, 6, device=CPU, processes=processes) as loader:
            found = list(loader)
            assert list(loader) == []
            children = [p for p in psutil.Process().children(recursive=True) if "forkserver" in " ".join(p.cmdline())]
            assert len(children) >= processes
        assert len(found) == len(expected)
        for mine, other in zip(found, expected, strict=True):
            assert all(torch.equal(mine[name], other[name]) for name in other)
    # The run's own generator stands where it stood: what it draws does not depend on the loader.
    assert torch.equal(torch.get_rng_state(), before)
    deadline = time.monotonic() + 20
    while _loading(psutil.Process()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _loading(psutil.Process())


def test_a_loader_that_is_left_early_ends_its_processes(train: Mixture) -> None:
    with Loader(batches(train), 0, 1000, device=CPU, processes=1) as loader:
        next(loader)
    deadline = time.monotonic() + 20
    while _loading(psutil.Process()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _loading(psutil.Process())


def test_an_evaluation_is_the_same_from_a_process(train: Mixture) -> None:
    parts = EvaluationBatches(train, Tensors(), batch_size=4, max_samples=10)
    expected = [parts.encoder[plan] for plan in parts.plans(0, len(parts))]
    with Loader(parts, 0, len(parts), device=CPU, processes=1) as loader:
        for mine, other in zip(loader, expected, strict=True):
            assert all(torch.equal(mine[name], other[name]) for name in other)


@pytest.mark.parametrize("processes", [0, 1])
def test_an_error_is_the_readers_own(copy: Path, tmp_path: Path, processes: int) -> None:
    spec = DataSpec(path=copy, chunk=4, cache={"folder": tmp_path / "index"})
    train = Demonstrations(spec, use_proprio=True).samples("train")
    for video in copy.glob("videos/observation.images.image/*/*.mp4"):
        video.unlink()
    with (
        Loader(batches(train), 0, 2, device=CPU, processes=processes) as loader,
        pytest.raises(DatasetError, match=r"^[^\n]*file-00\d\.mp4[^\n]*$"),
    ):
        next(loader)


@pytest.mark.parametrize(
    ("cpus", "gpu", "expected"),
    [(1, False, 0), (2, False, 1), (8, True, 7), (1, True, 1), (0.5, True, 1), (3.5, False, 2)],
)
def test_a_worker_keeps_one_core_for_itself(cpus: float, gpu: bool, expected: int) -> None:
    assert loader_processes(cpus, gpu) == expected


PROGRAM = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_loader import CPU, Tensors
from maps_ray.data import Batches, Demonstrations, Loader
from maps_ray.spec import DataSpec

def main():
    spec = DataSpec(path={root!r}, chunk=4, cache={{"folder": {folder!r}}})
    train = Demonstrations(spec, use_proprio=True).samples("train")
    batches = Batches(train, Tensors(), seed=3, global_batch_size=12)
    with Loader(batches, 0, 10**9, device=CPU, processes=1) as loader:
        for number, batch in enumerate(loader):
            print(number, flush=True)

if __name__ == "__main__":
    main()
"""


def test_no_process_outlives_one_that_is_killed_or_interrupted(squares: Recorded, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    tests = str(Path(__file__).parents[1])
    program.write_text(PROGRAM.format(tests=tests, root=str(squares.root), folder=str(tmp_path)))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), tests])}
    killed, interrupted = (
        subprocess.Popen(
            [sys.executable, str(program)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        for _ in range(2)
    )
    for process in (killed, interrupted):
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        if process is interrupted:
            # As a terminal does: to the whole group.
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.kill()
        _, errors = process.communicate(timeout=120)
        assert errors.count("Traceback") <= (process is interrupted), errors
        _, alive = psutil.wait_procs(family, timeout=120)
        assert not alive, alive


def _loading(process: psutil.Process) -> list[Any]:
    """Loader processes: children of the fork server."""
    servers = [child for child in process.children() if "forkserver" in " ".join(child.cmdline())]
    return [child for server in servers for child in server.children()]
