"""Do runs and sweeps end as if nothing had happened, whatever is killed, whenever?

    python benchmarks/chaos.py --kills 20 --seed 0
    python benchmarks/chaos.py --kills 200 --seed 0 --json chaos.json
    python benchmarks/chaos.py --kills 200 --seed 0 --minutes 30      # what is at work by then ends undisturbed

A Ray cluster of a head and two nodes, an MLflow server and an S3 server, all of this program's own, on this machine.
Runs under ZeRO-2 and ZeRO-3 and a sweep are made once undisturbed. Then they are made again, and a run on the S3
server, while SIGKILL comes at random moments, start-up and checkpoints included, to workers, trial actors,
controllers, mailboxes, whole nodes, the driver and both servers. A driver that was killed is started again with
`--continue`, a node and a server as an operator would; nothing else is mended. A run counts as lost unless it ends by
itself with every byte of its weights, and every step in MLflow once. At the end no process, no placement group, no
reserved CPU and no temporary file may be left.

The seed draws moments and victims. Where they fall in a run depends on the machine too.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from chaos_differences import differences
from chaos_machine import BUCKET, Machine
from sweep_overhead import ROOT, make_inputs

KILLS_OF_A_RUN = 5
TRIALS = 4
# A deck of kills: every kind is in it, what matters most, most often.
DECK = {"worker": 4, "starting worker": 3, "trial actor": 2, "controller": 2, "mailbox": 1}
DECK |= {"node": 2, "driver": 3, "MLflow server": 1, "S3 server": 2}
STARTING, AT_WORK, SAVING = "while starting", "at work", "at a checkpoint"
MOMENTS = (STARTING, AT_WORK, SAVING)
LIMIT_S = 1200.0


@dataclass(frozen=True)
class Case:
    """What is run: one kind of run, or a sweep."""

    kind: str
    calm: str
    """The kind whose undisturbed run has the same weights."""
    zero_stage: int = 2
    own_victim: str | None = None
    """What no other case has, or does not need."""
    steps: int = 60

    @property
    def all_steps(self) -> int:
        return self.steps * (TRIALS if self.is_sweep else 1)

    @property
    def is_sweep(self) -> bool:
        return self.own_victim == "trial actor"

    @property
    def is_on_s3(self) -> bool:
        return self.own_victim == "S3 server"


CASES = (
    Case("ZeRO-2", "ZeRO-2", 2),
    Case("sweep", "sweep", own_victim="trial actor", steps=30),
    Case("ZeRO-3 on S3", "ZeRO-3", 3, own_victim="S3 server"),
    Case("ZeRO-3", "ZeRO-3", 3),
)


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
    start_s: float = 0.0
    """Until its workers had begun to work."""

    @property
    def arguments(self) -> list[str]:
        return ["sweep" if self.case.is_sweep else "train", f"{self.name}.yaml", "--continue"]

    def folder(self, root: Path) -> Path:
        """Where this machine has its records while it runs."""
        return root / (f"scratch/s3/{BUCKET}/runs" if self.case.is_on_s3 else "runs") / self.name


class Chance:
    """What is killed and when, as the seed has it: shuffled decks, so that no kind and no moment is left out."""

    def __init__(self, seed: int) -> None:
        self.source = random.Random(seed)
        self._victims: list[str] = []
        self._moments: list[str] = []

    def moment(self) -> tuple[str, float]:
        """When the next kill is due: the moment, and how far into it, from 0 to 1."""
        if not self._moments:
            # The start twice: what is lost there is soon there again, so more kills find time.
            self._moments = self.source.sample([STARTING, *MOMENTS], 1 + len(MOMENTS))
        return self._moments.pop(), self.source.random()

    def victim(self, there: list[str], first: str | None) -> str:
        """The next kind of the deck that lives now; `first` before the others. Those before it keep their turn."""
        while not set(self._victims) & set(there):
            cards = [kind for kind, count in DECK.items() for _ in range(count)]
            self._victims += self.source.sample(cards, len(cards))
        wanted = [first] if first in there and first in self._victims else there
        kind = next(kind for kind in self._victims if kind in wanted)
        self._victims.remove(kind)
        return kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which nothing is killed any more")
    parser.add_argument("--json", type=Path, help="file for all that was seen")
    parser.add_argument("--keep", type=Path, help="folder to work in, which stays; else one that goes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp") as name:
        folder = options.keep.resolve() if options.keep else Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        found = chaos(folder, options.kills, options.seed, 60 * options.minutes, options.json)
    print(table(found))
    if found["faults"]:
        sys.exit("\n".join(found["faults"]))


def chaos(folder: Path, kills: int, seed: int, limit_s: float, out: Path | None) -> dict[str, Any]:
    """Makes courses in `folder` until so many kills were made, or for so long; returns what was killed and what was
    found wrong, which `out` has after each course."""
    began = time.monotonic()
    chance = Chance(seed)
    os.environ |= {"OMP_NUM_THREADS": "1", "MAPS_RAY_CACHE": str(folder / "frames")}
    make_inputs(folder)
    courses: list[Course] = []
    calm: dict[str, Course] = {}
    with Machine(folder) as machine:
        machine.start()
        say("the cluster is up")
        while (left := kills - sum(len(course.kills) for course in courses)) > 0:
            if time.monotonic() > began + limit_s:
                break
            case = CASES[len(courses) % len(CASES)]
            if case.calm not in calm:
                undisturbed = next(other for other in CASES if other.kind == case.calm)
                calm[case.calm] = quiet = Course(f"calm-{case.calm.lower()}", undisturbed)
                follow(machine, quiet)
                assert not quiet.given_up, quiet.given_up
                say(f"{quiet.name}: {quiet.seconds:.0f} s, {quiet.start_s:.0f} s of them until its workers worked")
            course = Course(f"hit-{len(courses)}-{case.kind.lower().replace(' ', '-')}", case)
            plan = Plan(chance, calm[case.calm], min(left, KILLS_OF_A_RUN), began + limit_s)
            follow(machine, course, plan)
            course.faults += differences(machine, calm[case.calm], course)
            courses.append(course)
            verdict = course.faults or "as undisturbed"
            say(f"{course.name}: {len(course.kills)} kills, {course.seconds:.0f} s; {verdict}")
            write(out, seen(seed, kills, courses, calm, [], began))
        left_over = machine.left_over()
    found = seen(seed, kills, courses, calm, left_over, began)
    write(out, found)
    return found


def write(out: Path | None, found: dict[str, Any]) -> None:
    if out:
        out.write_text(json.dumps(found, indent=1))


def seen(
    seed: int, kills: int, courses: list[Course], calm: dict[str, Course], left_over: list[str], began: float
) -> dict[str, Any]:
    """All that is known so far."""
    faults = [f"{c.name}: {fault}" for c in courses for fault in [*c.faults, *c.given_up]] + left_over
    return {
        "seed": seed,
        "wanted": kills,
        "kills": [{"course": course.name, **kill} for course in courses for kill in course.kills],
        "courses": [asdict(course) | {"case": course.case.kind} for course in courses],
        "undisturbed": [asdict(course) | {"case": course.case.kind} for course in calm.values()],
        "left_over": left_over,
        "faults": faults,
        "seconds": round(time.monotonic() - began),
        "cores": len(os.sched_getaffinity(0)),
    }


@dataclass
class Plan:
    """The kills of one course."""

    chance: Chance
    calm: Course
    most: int
    until: float
    """When killing ends, by the monotonic clock."""
    moment: str = ""
    share: float = 0.0
    since: float = 0.0
    """When something was last killed or started."""
    starts: bool = False
    """Whether the workers have been seen to start since then."""
    at_step: float | None = None
    """How far the run is to be at the kill; known once the workers are at work."""

    def draw(self) -> None:
        """The moment of the next kill."""
        self.moment, self.share = self.chance.moment()
        self.since, self.starts, self.at_step = time.monotonic(), False, None

    def due(self, machine: Machine, course: Course) -> str | None:
        """The moment that it is now, if something is to be killed now."""
        now, run = time.monotonic(), course.folder(machine.folder)
        if len(course.kills) >= self.most or now > self.until:
            return None
        if self.moment == STARTING:
            works = machine.works(run)
            self.starts = self.starts or not works
            if not (works and self.starts):
                # Where the last kill left the workers at work it is no start that this falls into.
                due = now > self.since + self.share * self.calm.start_s
                return None if not due else AT_WORK if works else STARTING
            # The start is over, sooner than in the undisturbed run.
            self.moment = AT_WORK
        if not machine.works(run):
            # What was at work a moment ago may have been lost with the last kill.
            self.at_step = None
            return None
        steps, all_steps = sum(machine.steps(run)), course.case.all_steps
        if self.at_step is None:
            # By steps, not by time: a busy machine may be twice as fast as it was in the undisturbed run.
            self.at_step = steps + 0.85 * self.share * (all_steps - steps)
        if steps < self.at_step:
            return None
        return self.moment if self.moment == AT_WORK or machine.saves(run) else None


def follow(machine: Machine, course: Course, plan: Plan | None = None) -> None:
    """Runs a course to its end, with what is planned on the way."""
    write_spec(machine.folder, course)
    run = course.folder(machine.folder)
    began = time.monotonic()

    def start() -> None:
        course.starts += 1
        machine.drive(course.arguments)

    start()
    if plan is not None:
        plan.draw()
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
        if not course.start_s and plan is None and machine.works(run):
            course.start_s = time.monotonic() - began
        if time.monotonic() > began + LIMIT_S:
            course.faults.append(f"not at its end after {LIMIT_S:.0f} s")
            machine.kill_driver()
            break
        moment = plan.due(machine, course) if plan is not None else None
        if plan is not None and moment is not None:
            victim = plan.chance.victim(there(machine, moment, course), rare(course, moment))
            step = max(machine.steps(run))
            if machine.kill("worker" if victim == "starting worker" else victim, plan.chance.source):
                at_s = round(time.monotonic() - began, 1)
                facts = {"step": step, "at_s": at_s, "load": round(os.getloadavg()[0], 1)}
                course.kills.append({"victim": victim, "when": moment, **facts})
                say(f"{course.name}: {victim} killed {moment}, {at_s:.0f} s, step {step}")
                if victim == "driver":
                    start()
            plan.draw()
        time.sleep(0.05)
    course.seconds = time.monotonic() - began
    machine.settle()


def rare(course: Course, moment: str) -> str | None:
    """A victim that few courses or moments have, as long as this course has spared it."""
    kind = "starting worker" if moment == STARTING else course.case.own_victim
    return kind if all(kill["victim"] != kind for kill in course.kills) else None


def there(machine: Machine, moment: str, course: Course) -> list[str]:
    """Kinds that live now, whose end this course feels."""
    other = "worker" if moment == STARTING else "starting worker"
    kinds = [kind for kind in DECK if kind != other and (kind != "S3 server" or course.case.is_on_s3)]
    return [kind for kind in kinds if machine.victims("worker" if kind == "starting worker" else kind)]


def write_spec(folder: Path, course: Course) -> None:
    splits = {"train": {"exclude_tasks": ["open*"]}, "ood": {"tasks": ["open*"]}}
    run = {
        "name": course.name,
        "model": {"checkpoint": "base"},
        "data": {"path": "demos", "splits": splits},
        "training": {
            **{"max_steps": course.case.steps, "batch_size": 1, "precision": "fp32"},
            **{"checkpoint_every": 5, "log_every": 5},
            "zero_stage": course.case.zero_stage,
        },
        "evaluation": {"every": 10, "batch_size": 4, "max_samples": 4},
        "cluster": {
            "workers": 1 if course.case.is_sweep else 2,
            "storage": f"s3://{BUCKET}/runs" if course.case.is_on_s3 else str(folder / "runs"),
            "scratch": str(folder / "scratch"),
            **{"max_failures": 20, "start_timeout_s": 300, "gpus_per_worker": 0},
        },
        "tracking": {"uri": f"http://127.0.0.1:{(folder / 'mlflow-port').read_text()}", "experiment": "chaos"},
    }
    if course.case.is_sweep:
        (folder / f"{course.name}-base.yaml").write_text(yaml.safe_dump(run))
        run = {
            "name": course.name,
            "base": f"{course.name}-base.yaml",
            "space": [str(ROOT / "tune_spaces" / f"{space}.yaml") for space in ("orders", "strengths")],
            "searcher": "random",
            "known_strengths": [],
            "num_samples": TRIALS,
            "max_concurrent": 2,
        }
    (folder / f"{course.name}.yaml").write_text(yaml.safe_dump(run))


def table(found: dict[str, Any]) -> str:
    """Markdown: what was killed when, and what came of it."""
    when = Counter((kill["victim"], kill["when"]) for kill in found["kills"])
    lines = [f"| killed | {' | '.join(MOMENTS)} | in all |", "|---|---|---|---|---|"]
    for victim in DECK:
        counts = [when[victim, moment] for moment in MOMENTS]
        lines.append(f"| {victim} | {' | '.join(map(str, counts))} | {sum(counts)} |")
    total = [sum(when[victim, moment] for victim in DECK) for moment in MOMENTS]
    lines.append(f"| in all | {' | '.join(map(str, total))} | {sum(total)} |")
    lines += ["", "| course | runs | kills | not as undisturbed | given up by their driver |", "|---|---|---|---|---|"]
    for case in CASES:
        courses = [course for course in found["courses"] if course["case"] == case.kind]
        counts = [len(courses), sum(len(c["kills"]) for c in courses), sum(bool(c["faults"]) for c in courses)]
        lines.append(f"| {case.kind} | {' | '.join(map(str, counts))} | {sum(bool(c['given_up']) for c in courses)} |")
    lines += ["", f"Left over at the end: {'; '.join(found['left_over']) or 'nothing'}."]
    load = [kill["load"] for kill in found["kills"]] or [0.0]
    lines.append(
        f"Seed {found['seed']}, {sum(total)} of {found['wanted']} kills, {found['seconds'] / 60:.0f} minutes on "
        f"{found['cores']} cores with a load of {min(load):.0f} to {max(load):.0f}."
    )
    return "\n".join(lines)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
