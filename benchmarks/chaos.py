"""Do runs and sweeps end as if nothing had happened, whatever is killed, whenever?

    python benchmarks/chaos.py --kills 20 --seed 0
    python benchmarks/chaos.py --kills 200 --seed 0 --json chaos.json

A Ray cluster of a head and two nodes, and an MLflow server, all of this program's own, on this machine. Runs under
ZeRO-2 and ZeRO-3 and a sweep are made once undisturbed. Then they are made again, while SIGKILL comes at random
moments, start-up included, to workers, trial actors, controllers, mailboxes, whole nodes, the driver and the MLflow
server. A driver that was killed is started again with `--continue`, a node and the server as an operator would; nothing
else is mended. A run counts as lost unless it ends by itself with every byte of its weights, and every step in MLflow
once. At the end no process, no placement group, no reserved CPU and no temporary file may be left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from chaos_machine import Machine
from sweep_overhead import ROOT, make_inputs

STEPS = 30
KILLS_OF_A_RUN = 7
# Every process is killed now and then; what matters most, most often.
WEIGHTS = {"worker": 5, "starting worker": 3, "trial actor": 4, "controller": 1, "mailbox": 1}
WEIGHTS |= {"node": 2, "driver": 3, "MLflow server": 2}
LIMIT_S = 1200.0


@dataclass
class Case:
    """What is run: one kind of run, or a sweep."""

    kind: str
    zero_stage: int = 2
    sweep: bool = False

    def arguments(self, name: str) -> list[str]:
        return ["sweep" if self.sweep else "train", f"{name}.yaml", "--continue"]


CASES = (Case("ZeRO-2", 2), Case("ZeRO-3", 3), Case("sweep", sweep=True))


@dataclass
class Course:
    """One run of a case, to its end."""

    name: str
    case: Case
    kills: list[dict[str, Any]] = field(default_factory=list)
    starts: int = 0
    """Of the driver."""
    given_up: list[str] = field(default_factory=list)
    """What a driver said that ended without having been killed, and before the end of the run."""
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for all that was seen")
    parser.add_argument("--keep", type=Path, help="folder to work in, which stays; else one that goes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp") as name:
        folder = options.keep.resolve() if options.keep else Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        found = chaos(folder, options.kills, options.seed)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    print(table(found))
    if found["faults"]:
        sys.exit("\n".join(found["faults"]))


def chaos(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Makes all courses in `folder`; returns what was killed and what was found wrong."""
    began = time.monotonic()
    source = random.Random(seed)
    os.environ |= {"OMP_NUM_THREADS": "1", "MAPS_RAY_CACHE": str(folder / "frames")}
    make_inputs(folder)
    courses: list[Course] = []
    with Machine(folder) as machine:
        machine.start()
        expected: dict[str, Course] = {}
        starts_s: dict[str, float] = {}
        while sum(len(course.kills) for course in courses) < kills:
            case = CASES[len(courses) % len(CASES)]
            if case.kind not in expected:
                expected[case.kind] = calm = Course(f"calm-{case.kind.lower()}", case)
                starts_s[case.kind] = follow(machine, calm, None, 0, 0.0)
                assert not calm.given_up, calm.given_up
                say(f"{calm.name}: {calm.seconds:.0f} s, {starts_s[case.kind]:.0f} s of them until the first step")
            course = Course(f"hit-{len(courses)}-{case.kind.lower()}", case)
            left = kills - sum(len(course.kills) for course in courses)
            follow(machine, course, source, min(left, KILLS_OF_A_RUN), starts_s[case.kind])
            course.faults += differences(machine, expected[case.kind], course)
            courses.append(course)
            say(
                f"{course.name}: {len(course.kills)} kills, {course.seconds:.0f} s; {course.faults or 'as undisturbed'}"
            )
        left_over = machine.left_over()
    faults = [f"{c.name}: {fault}" for c in courses for fault in [*c.faults, *c.given_up]] + left_over
    return {
        "seed": seed,
        "kills": [{"course": course.name, **kill} for course in courses for kill in course.kills],
        "courses": [vars(course) | {"case": course.case.kind} for course in courses],
        "left_over": left_over,
        "faults": faults,
        "seconds": round(time.monotonic() - began),
        "load": os.getloadavg(),
        "cores": len(os.sched_getaffinity(0)),
    }


def follow(machine: Machine, course: Course, source: random.Random | None, kills: int, start_s: float) -> float:
    """Runs a course to its end, with `kills` kills on the way; returns the seconds until the first step."""
    write_spec(machine.folder, course)
    began, first_step = time.monotonic(), 0.0
    deadline = began + LIMIT_S

    def start() -> None:
        course.starts += 1
        machine.drive(course.case.arguments(course.name))

    def pause() -> float:
        # As often before the workers work as after.
        return time.monotonic() + (source.uniform(0.0, 2.0) * start_s if source else LIMIT_S)

    start()
    next_kill = pause()
    while True:
        machine.look()
        ended = machine.driver_ended()
        if ended == 0:
            break
        if ended is not None:
            course.given_up.append(f"the driver ended with {ended}: {machine.last_words()}")
            if len(course.given_up) > 3:
                break
            start()
        if not first_step and machine.step(course.name) > 0:
            first_step = time.monotonic() - began
        if time.monotonic() > deadline:
            course.faults.append(f"not at its end after {LIMIT_S:.0f} s")
            machine.kill_driver()
            break
        if source and len(course.kills) < kills and time.monotonic() > next_kill:
            kill = machine.kill(choose(source, machine, course), source)
            if kill is not None:
                course.kills.append({**kill, "step": machine.step(course.name)})
                say(f"{course.name}: {kill['victim']} killed {kill['when']}")
                if kill["victim"] == "driver":
                    start()
                next_kill = pause()
        time.sleep(0.05)
    course.seconds = time.monotonic() - began
    machine.settle()
    return first_step


def choose(source: random.Random, machine: Machine, course: Course) -> str:
    """A kind of process that is there now."""
    there = [kind for kind in WEIGHTS if machine.victims(kind)]
    return source.choices(there, [WEIGHTS[kind] for kind in there])[0]


def write_spec(folder: Path, course: Course) -> None:
    splits = {"train": {"exclude_tasks": ["open*"]}, "ood": {"tasks": ["open*"]}}
    every = 5
    run = {
        "name": course.name,
        "model": {"checkpoint": "base"},
        "data": {"path": "demos", "splits": splits},
        "training": {
            **{"max_steps": STEPS, "batch_size": 1, "precision": "fp32", "checkpoint_every": every, "log_every": 5},
            "zero_stage": course.case.zero_stage,
        },
        "evaluation": {"every": 10, "batch_size": 4, "max_samples": 4},
        "cluster": {
            **{"workers": 1 if course.case.sweep else 2, "storage": str(folder / "runs"), "max_failures": 20},
            **{"start_timeout_s": 300, "gpus_per_worker": 0},
        },
        "tracking": {"uri": "http://127.0.0.1:MLFLOW", "experiment": "chaos"},
    }
    run["tracking"]["uri"] = f"http://127.0.0.1:{(folder / 'mlflow-port').read_text()}"
    if course.case.sweep:
        (folder / f"{course.name}-base.yaml").write_text(yaml.safe_dump(run))
        run = {
            "name": course.name,
            "base": f"{course.name}-base.yaml",
            "space": [str(ROOT / "tune_spaces" / f"{space}.yaml") for space in ("orders", "strengths")],
            "searcher": "random",
            "known_strengths": [],
            "num_samples": 4,
            "max_concurrent": 2,
        }
    (folder / f"{course.name}.yaml").write_text(yaml.safe_dump(run))


def differences(machine: Machine, calm: Course, course: Course) -> list[str]:
    """What a course left otherwise than the undisturbed one did."""
    folders = [machine.folder / "runs" / c.name for c in (calm, course)]
    if not course.case.sweep:
        return compare_runs(machine, *folders, course.name)
    names = [sorted(path.name for path in (folder / "trials").iterdir()) for folder in folders]
    if names[0] != names[1]:
        return [f"its trials are {names[1]}, undisturbed {names[0]}"]
    pairs = ((*(folder / "trials" / name for folder in folders), name) for name in names[0])
    return [
        fault for one, other, name in pairs for fault in compare_runs(machine, one, other, name, parent=course.name)
    ]


def compare_runs(machine: Machine, calm: Path, hit: Path, name: str, parent: str | None = None) -> list[str]:
    faults = []
    weights = sorted((calm / "final").glob("*.safetensors"))
    assert weights, calm
    for path in weights:
        other = hit / "final" / path.name
        if not other.exists() or other.read_bytes() != path.read_bytes():
            faults.append(f"{name}: {path.name} is not that of the undisturbed run")
    # Where the run was continued at its very end nothing but evaluations stands here.
    evaluations = [json.loads((folder / "evaluation.json").read_text()) for folder in (calm, hit)]
    if evaluations[0] != evaluations[1]:
        faults.append(f"{name}: evaluation.json is not that of the undisturbed run")
    faults += [f"{name}: {fault}" for fault in machine.recorded(name, parent, STEPS)]
    faults += [f"{name}: {path.relative_to(hit)} is left" for path in hit.rglob("*.partial")]
    return faults


def table(found: dict[str, Any]) -> str:
    """Markdown: what was killed when, and what came of it."""
    when = Counter((kill["victim"], kill["when"]) for kill in found["kills"])
    moments = ["while starting", "at work"]
    lines = ["| killed | while starting | at work | in all |", "|---|---|---|---|"]
    for victim in WEIGHTS:
        counts = [when[victim, moment] for moment in moments]
        if sum(counts):
            lines.append(f"| {victim} | {counts[0]} | {counts[1]} | {sum(counts)} |")
    total = [sum(when[victim, moment] for victim in WEIGHTS) for moment in moments]
    lines.append(f"| in all | {total[0]} | {total[1]} | {sum(total)} |")
    lines += ["", "| course | runs | kills | not as undisturbed | given up by their driver |", "|---|---|---|---|---|"]
    for case in CASES:
        courses = [course for course in found["courses"] if course["case"] == case.kind]
        counts = [len(courses), sum(len(c["kills"]) for c in courses), sum(bool(c["faults"]) for c in courses)]
        lines.append(f"| {case.kind} | {' | '.join(map(str, counts))} | {sum(bool(c['given_up']) for c in courses)} |")
    lines += ["", f"Left over at the end: {'; '.join(found['left_over']) or 'nothing'}."]
    lines.append(
        f"Seed {found['seed']}, {found['seconds'] / 60:.0f} minutes on {found['cores']} cores with a load of "
        f"{found['load'][1]:.0f}."
    )
    return "\n".join(lines)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
