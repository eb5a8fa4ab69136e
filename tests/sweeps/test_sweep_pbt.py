"""Population-based training over strengths: poor trials go on from good ones' checkpoints, under other strengths."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from ray import tune
from ray.train._internal.session import _FutureTrainingResult, _TrainingResult
from ray.tune.experiment import Trial
from safetensors.torch import load_file
from sweep_trials import trials

import maps_ray.sweeps
from maps_ray.spec import SpecError, load_spec
from maps_ray.spec.sweep_spec import load_sweep
from maps_ray.sweeps.driver import run_sweep
from maps_ray.sweeps.folder import Sweep, begin_folder
from maps_ray.sweeps.journal import Journal
from maps_ray.sweeps.objectives import evaluations
from maps_ray.sweeps.plan import make_plan
from maps_ray.sweeps.scheduler import make_scheduler
from maps_ray.sweeps.search import SweepSearch
from maps_ray.sweeps.sweep_report import write_sweep_report
from maps_ray.sweeps.trial import SweepTrial
from maps_ray.tracking.spool import read_history
from maps_ray.training.run_folder import EvaluationRecord, write_spec
from maps_ray.training.train import train

STEPS = 12
RUN = {
    "evaluation": {"every": 2, "batch_size": 4, "max_samples": 4},
    "training": {"max_steps": STEPS, "checkpoint_every": 6, "schedule": "constant", "keep_checkpoints": STEPS},
}
PBT = {"scheduler": {"name": "pbt", "options": {"quantile_fraction": 0.5}}, "known_strengths": []}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_samples": 1}, r"scheduler.name = 'pbt': copies trials from one another, and there is 1"),
        ({"num_samples": None, "time_budget_s": 600}, r"num_samples = None: pbt trains a population of a known size"),
        (
            {"num_samples": None, "searcher": "grid", "space": ["one.yaml"]},
            r"scheduler.name = 'pbt': .*there is 1: set num_samples to 4 or more, in a space of as many points",
        ),
        (
            {"scheduler": {"name": "pbt", "options": {"perturbation_interval": STEPS}}},
            r"scheduler.options.perturbation_interval = 12: must be at least 1 step and less than training.max_steps",
        ),
        (
            {"scheduler": {"name": "pbt", "options": {"perturbation_interval": "often"}}},
            r"scheduler.options.perturbation_interval = 'often': must be a number",
        ),
        (
            {"scheduler": {"name": "pbt", "options": {"quantile_fraction": 0}}},
            r"scheduler.options.quantile_fraction = 0: no trial would go on from another one",
        ),
        (
            {"scheduler": {"name": "asha", "options": {"reduction_factor": 1}}},
            r"scheduler.options.reduction_factor = 1: .*give a number above 1",
        ),
        ({"known_strengths": [1.0]}, r"known_strengths = .*set known_strengths to \[\]"),
        (
            {"scheduler": {"name": "pbt", "options": {"quantile": 0.5}}},
            r"scheduler.options.quantile = 0.5: pbt has no such option; did you mean 'quantile_fraction'",
        ),
        (
            {"scheduler": {"name": "pbt", "options": {"quantile_fraction": 0.9}}},
            r"scheduler.options = .*Ray Tune refuses them: .*quantile_fraction",
        ),
        ({"scheduler": "pb2"}, r"scheduler.name = 'pb2': .*is not installed: pip install GPy scikit-learn"),
        ({"searcher": "hebo"}, r"searcher.name = 'hebo': hebo is not installed: pip install HEBO"),
        ({"searcher": "optunna"}, r"searcher.name = 'optunna': unknown; did you mean 'optuna'"),
        (
            {"searcher": {"name": "optuna", "options": {"n_startup": 3}}},
            r"searcher.options.n_startup = 3: optuna has no such option; did you mean 'n_startup_trials'",
        ),
        (
            {"searcher": {"name": "optuna", "options": {"sampler": "NSGAIISampler", "population_size": 1}}},
            r"searcher.options = .*optuna refuses them: `population_size` must be",
        ),
        (
            {"searcher": {"name": "optuna", "options": {"sampler": "GridSampler"}}},
            r"searcher.options = .*optuna refuses them: .*missing 1 required",
        ),
        ({"searcher": ["optuna"]}, r"searcher = \['optuna'\]: a section: its fields are name, options"),
        ({"callbacks": ["json:JSONDecoder"]}, r"callbacks = 'json:JSONDecoder': is no ray.tune.Callback"),
        ({"callbacks": ["nowhere:Class"]}, r"callbacks = 'nowhere:Class': cannot be made"),
    ],
)
def test_searchers_and_schedulers_that_cannot_be(make_sweep, tmp_path, fields, message):
    (tmp_path / "one.yaml").write_text("lambda_max: {values: [1.0]}")
    with pytest.raises(SpecError, match=message):
        make_plan(load_sweep(make_sweep(run=RUN, **{**PBT, **fields})))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_four_trials_of_a_population(ray_session, make_sweep, tmp_path):
    plan = make_plan(load_sweep(make_sweep(run=RUN, baselines=["full_fine_tuning"], **PBT)))
    result = run_sweep(plan, show=False)
    journal = Journal(plan.folder)
    assert result.status == "finished" and len(journal.ended) == 5
    assert {ended.status for ended in journal.ended.values()} == {"finished"}
    assert {ended.step for ended in journal.ended.values()} == {STEPS}
    assert journal.changes
    for change in journal.changes:
        assert change.source != change.trial and change.trial != "full_fine_tuning" != change.source
        assert 0.25 <= change.proximity["lambda_max"] <= 4 and 0 < change.step < STEPS
        run_dir = plan.folder / "trials" / change.trial
        last = [c for c in journal.changes if c.trial == change.trial][-1]
        spec = (run_dir / "spec.yaml").read_text()
        assert f"lambda_max: {last.proximity['lambda_max']}" in spec
        steps = [step for step, _ in read_history(run_dir).metrics["train/loss"]]
        assert sorted(set(steps)) == list(range(1, STEPS + 1))
        # It took over the other's weights, so that its last run began there.
        assert json.loads((run_dir / "result.json").read_text())["start_step"] >= last.step
        assert not (run_dir / "kept").exists() and not (run_dir / "given").exists()
    grid = maps_ray.sweeps.results(str(plan.folder))
    assert len(grid) == 5 and grid.num_errors == 0
    assert {r.metrics["status"] for r in grid} == {"finished"}
    text = write_sweep_report(plan.folder).read_text()
    assert "Strengths in the course of training" in text

    # The last that was copied: a run of its own from the same checkpoint, under the strengths that it was given, ends
    # with the same weights to the last bit.
    change = max(journal.changes, key=lambda change: change.step)
    copied, source = (plan.folder / "trials" / name for name in (change.trial, change.source))
    spec = load_spec(copied / "spec.yaml", ["name=fresh", f"cluster.storage={tmp_path / 'alone'}"])
    assert spec.proximity.lambda_max == change.proximity["lambda_max"]
    spec.run_dir.mkdir(parents=True)
    write_spec(spec)
    step = f"step-{change.step:08d}"
    shutil.copytree(source / "checkpoints" / step, spec.run_dir / "checkpoints" / step)
    # Whose it is goes with it: a checkpoint of an unknown driver does not count.
    shutil.copyfile(source / "claims.json", spec.run_dir / "claims.json")
    alone = train(spec, resume=True, progress=False)
    assert alone.start_step == change.step and alone.status == "finished"
    theirs, ours = (load_file(run_dir / "final" / "model.safetensors") for run_dir in (spec.run_dir, copied))
    assert theirs.keys() == ours.keys() and all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    assert evaluations(spec.run_dir)[-1] == evaluations(copied)[-1]
    # And the strengths were others than the source's.
    own = load_spec(source / "spec.yaml").proximity
    assert own.lambda_max != spec.proximity.lambda_max or own.order != spec.proximity.order


class Saved(_FutureTrainingResult):
    def resolve(self, block=True):
        return self.future


class Population:
    """A controller of four trials, as PBT uses it; each trial's checkpoint is its name."""

    search_alg = None

    def __init__(self, sweep):
        self.folder = sweep.folder
        self.trials, self.paused = [], []
        search = SweepSearch(sweep)
        for number in range(5):
            self.trials.append(Trial("stub", stub=True, config=search.suggest(str(number)), trial_id=str(number)))

    def get_trials(self):
        return self.trials

    def get_live_trials(self):
        return set(self.trials)

    def pause_trial(self, trial, should_checkpoint):
        self.paused.append(trial)
        trial.status = Trial.PAUSED

    def _schedule_trial_save(self, trial, result):
        name, seen = trial.config["trial"]["name"], trial.last_result["step"]
        kept = self.folder / "trials" / name / "kept" / f"step-{seen:08d}"
        kept.mkdir(parents=True, exist_ok=True)
        (kept / "manifest.json").write_text(name)
        saved = self.folder / "tune" / name
        saved.mkdir(parents=True, exist_ok=True)
        (saved / "_dict_checkpoint.pkl").write_bytes(
            pickle.dumps({"name": name, "seen": seen, "kept": f"trials/{name}/kept/{kept.name}"})
        )
        return Saved(_TrainingResult(checkpoint=tune.Checkpoint(str(saved)), metrics=result))


def test_a_copied_trial_stays_itself_under_strengths_of_the_space(make_sweep):
    plan = make_plan(load_sweep(make_sweep(run=RUN, baselines=["full_fine_tuning"], **PBT)))
    sweep = begin_folder(plan, resume=False)
    population, scheduler = Population(sweep), make_scheduler(plan, sweep)
    facts = [dict(trial.config["trial"]) for trial in population.trials]
    assert [fact["source"] for fact in facts] == ["baseline", *["searched"] * 4]
    for trial in population.trials:
        scheduler.on_trial_add(population, trial)
        trial.status = Trial.RUNNING
    costs = (0.0, 1.0, 2.0, 3.0, 4.0)
    for step in (2, 4):
        for trial, cost in zip(population.trials, costs, strict=True):
            trial.status = Trial.RUNNING
            trial.run_metadata.last_result = {"step": step}
            scheduler.on_trial_result(population, trial, {"step": step, "cost": cost})
    # The best of all is a baseline: it is neither copied nor changed.
    assert {trial.trial_id for trial in population.paused} <= {"3", "4"} and population.paused
    assert [dict(trial.config["trial"]) for trial in population.trials] == facts
    changes = Journal(plan.folder).changes
    # A driver that is lost here: the next one's scheduler knows what this one knew.
    after = make_scheduler(plan, Sweep(plan))
    for trial in population.trials:
        after.on_trial_add(population, trial)
    after.choose_trial_to_run(population)
    known, before = (judge._inner._trial_state for judge in (after, scheduler))
    assert known.keys() == before.keys() == set(population.trials[1:])
    for trial in known:
        facts_of = [(s.last_score, s.last_perturbation_time, s.orig_tag) for s in (known[trial], before[trial])]
        assert facts_of[0] == facts_of[1] and known[trial].last_perturbation_time > 0
    assert Journal(plan.folder).changes == changes
    names = [fact["name"] for fact in facts]
    for change in {change.trial: change for change in changes}.values():
        given = plan.folder / "trials" / change.trial / "given" / f"step-{change.step:08d}"
        assert (given / "manifest.json").read_text() == change.source
    assert changes and {change.trial for change in changes} <= set(names[3:])
    assert {change.source for change in changes} <= set(names[1:3])
    for change in changes:
        assert 0.25 <= change.proximity["lambda_max"] <= 4 and len(change.proximity["order"]) == 5
        assert change.proximity == plan.space.decode(change.point) and change.step in (2, 4)
    # Trials that are asked for again go on where their last change put them.
    again = SweepSearch(Sweep(plan))
    configs = {c["trial"]["name"]: c for c in (again.suggest(str(number)) for number in range(5))}
    for change in {change.trial: change for change in changes}.values():
        assert change.point.items() <= configs[change.trial].items()


def test_a_trial_goes_on_from_a_copy_of_another_one(make_sweep):
    plan = make_plan(load_sweep(make_sweep(run=RUN, **PBT)))
    search = SweepSearch(begin_folder(plan, resume=False))
    trial = SweepTrial.__new__(SweepTrial)
    trial.setup(search.suggest("0"), str(plan.folder))
    run_dir = trial._spec.run_dir
    run_dir.mkdir(parents=True)
    for step in (4, 6):
        EvaluationRecord(run_dir).add(step, {"ood": {"action_l1": 0.5}})
        (run_dir / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    kept = run_dir.parent / "other" / "kept" / "step-00000004"
    kept.mkdir(parents=True)
    (kept / "manifest.json").write_text(json.dumps({"step": 4, "claim": "of the other"}))
    trial.load_checkpoint({"name": "other", "seen": 4, "kept": "trials/other/kept/step-00000004"})
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000004"]
    # It counts as a checkpoint of this trial, and the other's is what it was.
    manifest = json.loads((run_dir / "checkpoints" / "step-00000004" / "manifest.json").read_text())
    assert trial._fence.accepts(manifest["claim"], 4) and manifest["step"] == 4
    assert json.loads((kept / "manifest.json").read_text())["claim"] == "of the other"
    assert [step for step, _ in evaluations(run_dir)] == [4]
    assert trial.save_checkpoint("") == {"name": trial._spec.name, "seen": 4, "kept": None}


def test_a_known_schedule_keeps_what_the_space_leaves_open(make_sweep):
    """The space has no shape: what the point leaves open is the schedule's own."""
    run = {**RUN, "proximity": {"shape": "cosine"}}
    plan = make_plan(load_sweep(make_sweep(run=run, known_strengths=[1.0])))
    search = SweepSearch(begin_folder(plan, resume=False))
    trial = SweepTrial.__new__(SweepTrial)
    trial.setup(search.suggest("0"), str(plan.folder))
    assert trial._spec.proximity.shape == "linear" and trial._spec.proximity.lambda_max == 1.0
    # Its order is the base's, said in full.
    (expected,) = trials(plan, plan.known()[0])
    first, second = (plan.identity(spec.proximity.model_dump()) for spec in (trial._spec, expected))
    assert first == second
