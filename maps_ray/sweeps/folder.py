"""The folder of a sweep: who may write it, with which spec, and what of it goes to an object store.

    <storage>/<name>/
      sweep.json       the resolved sweep spec
      base.yaml        the base run spec that every trial starts from; space.yaml, baselines.yaml
      inputs.json      what its base checkpoint and data are, by content
      journal.jsonl    schedules decided, each change of one in training, and trials ended (`journal`)
      timeline.jsonl   nodes, trials pending and running, whenever one of them changes
      tune/            Ray Tune's own experiment folder
      scheduler.pkl    what the scheduler knows, which Tune does not store
      claims.json      which drivers have taken the sweep (`maps_ray.training.claims`)
      trials/          one run folder for each trial, like those of `maps-ray train`
      workers/         what Ray Train writes of each group of workers
      report.html

Under an object store the driver works on a copy of it in its node's scratch. Journal and scheduler are on the store
before anything acts on them, Tune writes there itself, and each trial is a run on the store: a driver that is lost with
its disk loses nothing that counts.
"""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from maps_ray.files import read_json, write_atomically, write_json
from maps_ray.run_copies import fetched
from maps_ray.run_storage import RunStorage
from maps_ray.spec import Problem, RunSpec, SpecError, dump, parse, read_dumped, to_yaml
from maps_ray.spec.sweep_spec import SweepSpec
from maps_ray.sweeps.journal import Journal
from maps_ray.sweeps.schedules import Plan
from maps_ray.sweeps.space import MergeFields, Space, baselines, load_space
from maps_ray.tracking.spool import Spool
from maps_ray.training.claims import Fence
from maps_ray.training.inputs import fingerprints, without_places
from maps_ray.training.mirror import Mirror
from maps_ray.training.run_folder import INPUTS_FILE, flat, other_inputs
from maps_ray.training.shelf import MANIFEST

SPEC_FILE = "sweep.json"
BASE_FILE = "base.yaml"
SPACE_FILE = "space.yaml"
_BASELINES_FILE = "baselines.yaml"
KEPT, GIVEN = "kept", "given"
"""In a trial's folder: copies of its checkpoints that others may go on from, and one that it goes on from itself."""
# What may differ when a sweep goes on: how much of it is done, and how it is recorded and spread.
_MAY_CHANGE = (
    *("num_samples", "merge.num_samples", "time_budget_s", "worker_hours", "max_concurrent", "callbacks"),
    *("seconds_per_step", "measured_run", "base: cluster.", "base: tracking.uri", "base: tracking.credentials"),
)
# Of a sweep on an object store, what no report and no further trial asks for.
_UNREPORTED = "final|rollouts|tune"
_PULLS = 8


class Sweep:
    """A sweep as its driver has it in hand.

    Args:
        plan: whose folder has been begun.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.folder = plan.folder
        self.mirror = Mirror.of(plan.base)
        self.journal = Journal(self.folder, lambda: self.mirror.push(Journal.FILE))
        self.copies = Copies(self.folder, self.mirror.storage)
        self._fence: Fence | None = None

    def take_over(self) -> None:
        """Makes it this driver's: another one that still has it ends."""
        self._fence = Fence.earlier(self.folder, self.mirror.storage).claim(0)

    def require(self) -> None:
        """
        Raises:
            OvertakenError: the sweep belongs to another driver now.
        """
        if self._fence is not None:
            self._fence.require()

    def trial_dir(self, name: str) -> Path:
        """The run folder of a trial, on this node."""
        return self.folder / "trials" / name

    def write(self, name: str, content: bytes) -> None:
        """Replaces a file of the folder; it is where it belongs when this returns."""
        write_atomically(self.folder / name, content)
        self.mirror.push(name)

    def adopt(self) -> None:
        """Has the records of all trials on record shipped with the sweep's own, which is begun."""
        for name in self.journal.trials(self.plan):
            if (child := Spool(self.trial_dir(name))).exists:
                Spool(self.folder).adopt(child)


class Copies:
    """Checkpoints of a sweep's trials that others go on from. A name is relative to the sweep's folder, as
    `trials/DSPEL-000/kept/step-00000004`; a copy is complete, or not there.

    Args:
        folder: of the sweep.
        storage: the same on an object store, if it is there.
    """

    def __init__(self, folder: Path, storage: RunStorage | None) -> None:
        self._folder, self._storage = folder, storage

    def has(self, name: str) -> bool:
        if self._storage is not None:
            return self._storage.exists(f"{name}/{MANIFEST}")
        return (self._folder / name).is_dir()

    def copy(self, source: str, to: str) -> None:
        """Within the store; in a folder by hard links where it has them."""
        if self._storage is not None:
            self._storage.copy_folder(source, to, last=MANIFEST)
            return
        target = self._folder / to
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for path in (self._folder / source).iterdir():
            try:
                os.link(path, partial / path.name)
            except OSError:
                shutil.copyfile(path, partial / path.name)
        partial.rename(target)

    def claim(self, name: str, token: str | None) -> None:
        """Makes a copy count as a checkpoint of the run that a driver of this token has."""
        if self._storage is not None:
            manifest = json.loads(self._storage.read(f"{name}/{MANIFEST}"))
            self._storage.write(f"{name}/{MANIFEST}", json.dumps({**manifest, "claim": token}).encode())
        elif (path := self._folder / name / MANIFEST).is_file():
            # Another file: this one may be the source's own, by a hard link.
            write_atomically(path, json.dumps({**json.loads(path.read_bytes()), "claim": token}))

    def prune(self, name: str, keep: int = 0) -> None:
        """Removes all but the newest copies in a folder, or all that is in it."""
        for old in self._names(name)[: -keep or None]:
            self._remove(f"{name}/{old}")
        if keep == 0:
            self._remove(name)

    def _names(self, name: str) -> list[str]:
        if self._storage is not None:
            return sorted({file.partition("/")[0] for file in self._storage.files(name)})
        # Without what was still being copied when its process was lost.
        return sorted(path.name for path in (self._folder / name).glob("[!.]*"))

    def _remove(self, name: str) -> None:
        if self._storage is not None:
            # What is removed in part must not count any more.
            self._storage.remove_folder(name, first=MANIFEST)
        else:
            shutil.rmtree(self._folder / name, ignore_errors=True)


def make_folder(plan: Plan, resume: bool) -> None:
    """Makes the folder on this node, where a sweep is to go on and was begun, or is to begin and was not.

    Raises:
        SpecError: that is not so, or the folder cannot be made.
    """
    begun = Mirror.of(plan.base).has(SPEC_FILE)
    name, place = plan.spec.name, plan.base.run_place
    if begun and not resume:
        message = f"{place} exists already; continue that sweep with --resume {name}, or choose another name"
        raise SpecError([Problem("name", name, message)])
    if not begun and Mirror.of(plan.base).has("spec.yaml"):
        message = f"{place} is the folder of a run of `maps-ray train`; choose another name"
        raise SpecError([Problem("name", name, message)])
    if resume and not begun:
        raise SpecError([Problem("--resume", name, f"nothing to resume: {place}/{SPEC_FILE} is missing")])
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"cannot be written: {error}"
        raise SpecError([Problem("base: cluster.storage", str(plan.folder.parent), message)]) from None


def begin_folder(plan: Plan, resume: bool) -> Sweep:
    """Begins a sweep's folder, or checks that it holds this very sweep. Under an object store, this node's copy is
    brought up to the store's: its lock is held.

    Raises:
        SpecError: it exists and `resume` is false; there is nothing to resume; or the specs differ, with each
            difference.
    """
    make_folder(plan, resume)
    folder, mirror, spec = plan.folder, Mirror.of(plan.base), plan.spec
    if resume:
        _pull(plan, mirror)
        earlier = read_spec(folder)
        now = _content(spec, plan.base, plan.space)
        before = _content(earlier, read_base(folder), read_space(folder))
        # A sweep that goes on by its name was read from this folder: the files it came from stay on record.
        spec = spec.model_copy(update={"base": earlier.base, "overrides": earlier.overrides, "space": earlier.space})
        problems = [
            Problem(
                field,
                now.get(field),
                f"the sweep was started with {before.get(field)!r}; set it back, or start another",
            )
            for field in sorted(before.keys() | now.keys())
            if before.get(field) != now.get(field) and not field.startswith(_MAY_CHANGE)
        ]
        problems += other_inputs(plan.base, read_base(folder))
        if problems:
            raise SpecError(problems)
    else:
        mirror.begin()
        write_json(folder / INPUTS_FILE, fingerprints(plan.base))
    write_atomically(folder / BASE_FILE, dump(plan.base))
    space = plan.space.spec.model_dump(mode="json", exclude_none=True)
    write_atomically(folder / SPACE_FILE, to_yaml(space, sort_keys=True))
    chosen = baselines(plan.spec.space) if spec.baselines else {}
    kept = {name: chosen[name] for name in spec.baselines}
    write_atomically(folder / _BASELINES_FILE, to_yaml(kept, sort_keys=True))
    write_json(folder / SPEC_FILE, spec.model_dump(mode="json"))
    # Last: it is what makes the folder a sweep's.
    mirror.push(BASE_FILE, SPACE_FILE, _BASELINES_FILE, INPUTS_FILE, SPEC_FILE)
    return Sweep(plan)


def _pull(plan: Plan, mirror: Mirror) -> None:
    """Brings this node's copy of the sweep and its trials up to the object store's, if it lies on one."""
    if mirror.storage is None:
        return
    mirror.pull(plan.base)
    names = Journal(plan.folder).trials(plan)

    def pull(name: str) -> None:
        assert mirror.storage is not None
        Mirror(plan.folder / "trials" / name, mirror.storage.inside(f"trials/{name}")).pull(plan.base)

    with ThreadPoolExecutor(_PULLS) as pool:
        list(pool.map(pull, names))


def spec_of_copies(folder: Path) -> SweepSpec:
    """The sweep's spec with the folder's copies of base and space: what they were made from may have been edited."""
    spec = read_spec(folder)
    copies = {"base": folder / BASE_FILE, "overrides": (), "space": [str(folder / SPACE_FILE)] if spec.space else []}
    return spec.model_copy(update=copies)


def find_sweep(name: str, storage: Path | None = None) -> Path:
    """The folder of a sweep, by its path, by its name under `storage`, which is `runs` by default, or by its address on
    an object store, from where what a report needs is fetched.

    Raises:
        SpecError: there is none.
    """
    candidates = [Path(name), (storage or Path("runs")) / name]
    if "://" in name:
        candidates = [fetched(name, without=_UNREPORTED)]
    folder = next((path for path in candidates if (path / SPEC_FILE).is_file()), None)
    if folder is None:
        places = [name] if "://" in name else list(dict.fromkeys(map(str, candidates)))
        message = f"no sweep there: no {SPEC_FILE} in {' nor in '.join(places)}; give its folder or its address"
        raise SpecError([Problem("NAME", name, message)])
    return folder.resolve()


def read_spec(folder: Path) -> SweepSpec:
    """The sweep spec that a folder was started with.

    Raises:
        SpecError: it cannot be read, or is none.
    """
    try:
        raw = read_json(folder / SPEC_FILE)
    except (OSError, ValueError) as error:
        message = f"cannot be read ({error}): bring it back as it was, or start the sweep anew under another name"
        raise SpecError([Problem(SPEC_FILE, str(folder / SPEC_FILE), message)]) from None
    return parse(SweepSpec, raw)


def read_base(folder: Path) -> RunSpec:
    """The base that a folder's trials start from, the sweep's overrides included."""
    return read_dumped(folder / BASE_FILE)


def read_space(folder: Path) -> Space:
    """The space that a folder's sweep searches."""
    return load_space(spec_of_copies(folder).space)


def place_of(folder: Path) -> str:
    """Where others find the sweep of a folder: the folder, or what it is a copy of on an object store."""
    base = read_base(folder)
    return str(folder) if isinstance(base.cluster.storage, Path) else base.run_place


def source_run(folder: Path, trial: str, merge: MergeFields) -> tuple[str, MergeFields]:
    """The run whose weights a trial merges, of several seeds that of its own; and how, as `merge` takes it."""
    how = merge.copy()
    if "run" in how:
        return how.pop("run"), how
    seed = f"-s{trial.rpartition('-s')[2]}" if read_spec(folder).seeds > 1 else ""
    return f"{place_of(folder)}/trials/{how.pop('of')}{seed}", how


def _content(spec: SweepSpec, base: RunSpec, space: Space) -> dict[str, object]:
    # These three say where something was read; what was read is compared.
    own = flat({k: v for k, v in spec.model_dump(mode="json").items() if k not in ("base", "overrides", "space")})
    own |= flat(space.spec.model_dump(mode="json"), "space")
    return own | {f"base: {field}": value for field, value in flat(without_places(base)).items()}
