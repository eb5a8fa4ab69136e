"""The evidence: what orders and strengths do to policies that succeed. docs/evidence-plan.md is what it carries out.

    python benchmarks/evidence.py --hours 2                # two hours of it; the same command goes on
    python benchmarks/evidence.py --report                 # tables and pictures of what has been measured
    python benchmarks/evidence.py --rehearse --out /tmp/r  # all of it at a size that says nothing, to see that it runs

Needs an environment with maps_ray[metaworld]. Everything lies in one folder (`--out`, runs/evidence): inputs (`demos`,
`scenes`, `base`, `offline`, made once from seeds), runs (sweeps of `maps-ray sweep`), and `results`, one small file for
each measured run, of which alone the report is made. Work is done in the plan's order: seed by seed all arms, then the
search, then its winner on fresh seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence_measures import EPISODES, SUITES, Made, count_as_failed, knowledge, measure
from evidence_report import write_report

from maps_ray.evaluation.rollouts.plan import Stopped
from maps_ray.evaluation.simulators.metaworld_small import PREFIX
from maps_ray.exit_codes import STOPPED
from maps_ray.files import write_json
from maps_ray.spec.sweep_spec import load_sweep
from maps_ray.sweeps.journal import Ended, Journal
from maps_ray.training.merge import merge

ROOT = Path(__file__).resolve().parents[1]
FIRST_STATE, FRESH_STATE = 1000, 2000
"""First initial states that are reported: of the arms, and of the search's winner. Demonstrations and the search begin
with 0."""


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    seeds: range
    fresh_seeds: range
    demonstrations: int
    """Of each task, the last four held out."""
    offline: int
    """Demonstrations of each task and suite for the offline error."""
    pictures: int
    pretraining: tuple[str, ...]
    """Options of jobs/pretrain_tiny.py."""
    episodes: Mapping[str, int]
    """Of each task of a suite."""
    overrides: tuple[str, ...] = ()
    """Of each run."""
    arms: tuple[str, ...] = ()
    """Changes of jobs/evidence/arms.yaml."""
    search: tuple[str, ...] = ()
    """Changes of jobs/evidence/search.yaml."""
    searched: tuple[str, ...] = ()
    """Overrides of each run of the search."""


_PRETRAINING = ("--steps", "600", "--alignment-steps", "250", "--learning-rate", "1.5e-3")
REGISTERED = Size(range(5), range(100, 105), 40, 2, 2520, _PRETRAINING, EPISODES)
REHEARSAL = Size(
    range(2),
    range(100, 102),
    6,
    1,
    40,
    ("--steps", "2", "--alignment-steps", "1"),
    dict.fromkeys(EPISODES, 1),
    ("training.max_steps=4", "training.warmup_steps=1", "evaluation.every=2", "training.checkpoint_every=2"),
    ("baselines=[full_fine_tuning, lora]",),
    ("num_samples=3", "scheduler={name: asha, options: {grace_period: 2, reduction_factor: 2}}"),
    ("evaluation.rollouts.every=2", "evaluation.rollouts.episodes=1", "evaluation.rollouts.max_steps=8"),
)
MERGED: dict[str, dict[str, Any]] = {
    "wise_ft": {"weights": dict.fromkeys(("dinov2", "siglip", "projector", "language"), 0.5)},
    "lines": {"lines": (0.5, 1.0)},
}
"""Merges of each plain run: WiSE-FT with its authors' default of one half, LiNeS from one half to all of it."""
PLAIN, PAPER, WINNER = "full_fine_tuning", "maps_paper", "winner"
_GRACE_S = 180.0


class OutOfTime(Exception):
    """The hours given are over; the same command goes on."""


@dataclass(frozen=True)
class Clock:
    """How long this call may work."""

    ends: float

    def left(self) -> float:
        """Seconds; at least a minute, or `OutOfTime`."""
        left = self.ends - time.monotonic()
        if left < 60:
            raise OutOfTime
        return left

    def over(self) -> bool:
        """Whether to stop."""
        return time.monotonic() > self.ends

    def run(self, *command: str) -> None:
        """Runs a command of ours that goes on where it was, and interrupts it when the time is over.

        Raises:
            OutOfTime: it was interrupted.
            SystemExit: it failed.
        """
        print("$", " ".join(command), flush=True)
        # In a session of its own: Ctrl-C reaches this process alone, which passes it on once, and all that is left of
        # the group can be killed at the end.
        with subprocess.Popen(command, cwd=ROOT, start_new_session=True, preexec_fn=_heed_interrupts) as process:
            try:
                process.wait(self.left())
            except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
                process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE_S)
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                raise OutOfTime from reason
        if process.returncode == STOPPED:
            raise OutOfTime
        if process.returncode:
            raise SystemExit(f"failed with status {process.returncode}: {' '.join(command)}")


def _heed_interrupts() -> None:
    """Of a child: a shell that starts this in the background makes it, and so its children, deaf to SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="folder of the experiment")
    parser.add_argument("--hours", type=float, default=2.0, help="after which this call stops")
    parser.add_argument("--report", action="store_true", help="write tables and pictures of what was measured")
    parser.add_argument("--to", type=Path, help="with --report: folder to write to; else the experiment's")
    parser.add_argument("--rehearse", action="store_true", help="a size that says nothing; needs a folder of its own")
    options = parser.parse_args()
    if options.rehearse and options.out == parser.get_default("out"):
        parser.error("--rehearse: name a folder of its own with --out")
    size = REHEARSAL if options.rehearse else REGISTERED
    made = Made(options.out.resolve())
    if options.report:
        print(write_report(made.folder, options.to or made.folder / "report"))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    clock = Clock(time.monotonic() + 3600 * options.hours)
    try:
        prepare(made, clock, size)
        for seed in size.seeds:
            arms(made, clock, size, seed)
        search(made, clock, size)
        confirm(made, clock, size)
    except (OutOfTime, Stopped, KeyboardInterrupt):
        print("stopped; the same command goes on")
        raise SystemExit(STOPPED) from None
    print("all has been measured: --report")


def prepare(made: Made, clock: Clock, size: Size) -> None:
    """Demonstrations, pictures, the base, and its own knowledge before fine-tuning."""
    ours = [sys.executable, "-m", "maps_ray.cli"]
    collect = ["--image-size", "64", "--workers", "2"]
    if not (made.demos / "meta" / "info.json").is_file():
        clock.run(
            *ours,
            "collect",
            "--suite",
            PREFIX,
            "--episodes",
            str(size.demonstrations),
            "--out",
            str(made.demos),
            *collect,
        )
    for number, suite in enumerate(SUITES):
        out = made.offline(suite)
        if not (out / "meta" / "info.json").is_file():
            out.parent.mkdir(parents=True, exist_ok=True)
            # Another seed of the noise: the first states are those of the demonstrations.
            seed = ["--seed", str(1 + number)]
            clock.run(
                *ours, "collect", "--suite", suite, "--episodes", str(size.offline), "--out", str(out), *seed, *collect
            )
    if not (made.base / "config.json").is_file():
        render = ["--world", PREFIX, "--image-size", "64", "--count", str(size.pictures), "--workers", "2"]
        clock.run(sys.executable, "jobs/render_scenes.py", "--out", str(made.scenes), *render)
        folders = ["--scenes", str(made.scenes), "--work", str(made.folder / "pretrain"), "--out", str(made.base)]
        clock.run(sys.executable, "jobs/pretrain_tiny.py", *folders, *size.pretraining)
    before = made.folder / "results" / "base.json"
    if not before.is_file():
        before.parent.mkdir(exist_ok=True)
        write_json(before, knowledge(made.base, made))


def arms(made: Made, clock: Clock, size: Size, seed: int) -> None:
    """Trains all arms with one seed, measures them, then the merges of the plain run."""
    folder = sweep(made, clock, "arms", f"arms-s{seed}", size.arms, [f"training.seed={seed}", *size.overrides])
    for arm, run, ended in runs(folder):
        result = made.folder / "results" / "arms" / f"{arm}-s{seed}.json"
        about = {"arm": arm, "seed": seed, "seconds": ended.seconds}
        if ended.status != "finished":
            count_as_failed(result, about, ended.error or ended.status, FIRST_STATE, size.episodes)
            continue
        if not result.is_file():
            clock.left()
            measure(run / "final", run, made, FIRST_STATE, about, result, size.episodes, clock.over)
        if arm == PLAIN:
            merges(made, clock, size, seed, run)


def merges(made: Made, clock: Clock, size: Size, seed: int, run: Path) -> None:
    """The plain run's weights drawn back toward the base; the merged weights are removed when they are measured."""
    for arm, how in MERGED.items():
        result = made.folder / "results" / "arms" / f"{arm}-s{seed}.json"
        if result.is_file():
            continue
        clock.left()
        merged = run / "merged" / arm
        if not merged.is_dir():
            merged.parent.mkdir(exist_ok=True)
            merge(run, merged, base=made.base, **how)
        about = {"arm": arm, "seed": seed, "seconds": 0.0}
        measure(merged, run, made, FIRST_STATE, about, result, size.episodes, clock.over)
        shutil.rmtree(merged)


def search(made: Made, clock: Clock, size: Size) -> None:
    """The sweep over orders, shapes and strengths, kept as one file of points and values."""
    folder = sweep(made, clock, "search", "search", size.search, [*size.overrides, *size.searched])
    journal = Journal(folder)
    trials = [
        {
            "trial": ended.trial,
            "label": journal.schedules[ended.schedule].label,
            "proximity": journal.schedules[ended.schedule].proximity,
            "status": ended.status,
            "step": ended.step,
            "values": ended.values,
        }
        for ended in journal.ended.values()
    ]
    write_json(made.folder / "results" / "search.json", trials)


def winner(made: Made) -> dict[str, Any]:
    """The search's best schedule among the trials that ran to the end: most success out of distribution."""
    trials = json.loads((made.folder / "results" / "search.json").read_text(encoding="utf-8"))
    ended = [trial for trial in trials if trial["status"] == "finished"]
    best: dict[str, Any] = max(ended, key=lambda trial: (trial["values"]["rollout/ood/success"], trial["trial"]))
    return best


def confirm(made: Made, clock: Clock, size: Size) -> None:
    """The winner and the paper's order on fresh seeds and fresh initial states."""
    found: dict[str, dict[str, Any]] = {PAPER: {}, WINNER: winner(made)["proximity"]}
    for seed in size.fresh_seeds:
        for arm, proximity in found.items():
            name = f"{arm}-s{seed}"
            run, result = made.folder / "confirm" / name, made.folder / "results" / "confirm" / f"{name}.json"
            if result.is_file():
                continue
            if not (run / "final" / "config.json").is_file():
                chosen = [f"proximity.{field}={json.dumps(value)}" for field, value in proximity.items()]
                chosen += [
                    *size.overrides,
                    *places(made),
                    f"cluster.storage={made.folder / 'confirm'}",
                    f"training.seed={seed}",
                    f"name={name}",
                ]
                settings = [part for override in chosen for part in ("--set", override)]
                spec = str(ROOT / "jobs" / "evidence" / "small.yaml")
                clock.run(sys.executable, "-m", "maps_ray.cli", "train", spec, *settings, "--continue")
            measure(
                run / "final", run, made, FRESH_STATE, {"arm": arm, "seed": seed}, result, size.episodes, clock.over
            )


def sweep(made: Made, clock: Clock, spec: str, name: str, changes: Sequence[str], overrides: Sequence[str]) -> Path:
    """Runs or continues a sweep of jobs/evidence under a name; its folder.

    Args:
        made: the experiment's inputs.
        clock: how long it may take.
        spec: name of its file.
        name: of the sweep.
        changes: `field=value` changes of the sweep spec.
        overrides: the same of each run, after the spec's own.
    """
    folder = made.folder / name
    ended = folder / "all_ended"
    if not ended.is_file():
        path = ROOT / "jobs" / "evidence" / f"{spec}.yaml"
        chosen = [*load_sweep(path).overrides, *overrides, *places(made), f"cluster.storage={made.folder}"]
        settings = [f"name={name}", f"overrides={json.dumps(chosen)}", *changes]
        pairs = [part for setting in settings for part in ("--set", setting)]
        clock.run(sys.executable, "-m", "maps_ray.cli", "sweep", str(path), *pairs, "--continue")
        ended.touch()
    return folder


def places(made: Made) -> list[str]:
    """Overrides that name the inputs."""
    return [f"model.checkpoint={made.base}", f"data.path={made.demos}"]


def runs(sweep_folder: Path) -> Iterator[tuple[str, Path, Ended]]:
    """(arm, folder, how it ended) of each run of a sweep."""
    journal = Journal(sweep_folder)
    for ended in sorted(journal.ended.values(), key=lambda ended: ended.schedule):
        schedule = journal.schedules[ended.schedule]
        arm = PAPER if schedule.source == "known" else schedule.label
        yield arm, sweep_folder / "trials" / ended.trial, ended


if __name__ == "__main__":
    main()
