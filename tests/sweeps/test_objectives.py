"""Success rates are maximised, errors minimised: searcher, scheduler, ranking, Pareto set and report alike."""

from __future__ import annotations

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from sweep_trials import trials

from maps_ray.spec import SpecError
from maps_ray.spec.sweep_spec import load_sweep
from maps_ray.sweeps.dry_run import plan_lines
from maps_ray.sweeps.folder import Sweep, begin_folder
from maps_ray.sweeps.journal import Ended, Journal
from maps_ray.sweeps.objectives import aims, cost, logged_metrics, newest_values
from maps_ray.sweeps.plan import make_plan
from maps_ray.sweeps.record import read_sweep
from maps_ray.sweeps.scheduler import make_scheduler
from maps_ray.sweeps.search import SweepSearch
from maps_ray.sweeps.searchers import make_searcher
from maps_ray.sweeps.sweep_report import render
from maps_ray.sweeps.trial import SweepTrial
from maps_ray.tracking import Tracker
from maps_ray.training.run_folder import EvaluationRecord

SUCCESS, OOD = "rollout/libero_object/success", "eval/ood/action_l1"
ROLLOUTS = {
    "evaluation": {
        "every": 2,
        "batch_size": 4,
        "max_samples": 4,
        "rollouts": {"suites": ["libero_object"], "episodes": 2, "every": 4},
    }
}


class Judged:
    """A sweep's scheduler, shown results of trials as Tune shows them."""

    def __init__(self, sweep):
        self.scheduler = make_scheduler(sweep.plan, sweep)
        self.trials = {}
        self.search_alg = None

    def get_trials(self):
        return list(self.trials.values())

    def report(self, name, step, value, **fields):
        """Whether the trial ends at this value of the first objective, a success rate."""
        if name not in self.trials:
            facts = {"name": name, "seed": 0, "source": "searched", "proximity": {}, **fields}
            self.trials[name] = Trial("stub", stub=True, config={"trial": facts}, trial_id=name)
            self.scheduler.on_trial_add(self, self.trials[name])
        result = {"step": step, "cost": -value}
        return self.scheduler.on_trial_result(self, self.trials[name], result) == TrialScheduler.STOP


@pytest.fixture(autouse=True)
def any_machine(monkeypatch):
    """Nothing here starts a simulator: it need not be installed."""
    monkeypatch.setattr("maps_ray.training.rollout_checks._missing", lambda needs, suites: [])


def test_a_success_rate_is_maximised_and_everything_else_minimised():
    assert cost(SUCCESS, 0.25) == -0.25 and cost(OOD, 0.25) == 0.25 and cost("train/success_loss", 1.0) == 1.0
    assert aims((OOD, SUCCESS, "eval/held_out/action_l1")) == (
        f"minimising {OOD}, eval/held_out/action_l1, maximising {SUCCESS}"
    )


@pytest.fixture
def rollout_plan(make_sweep):
    """A sweep by success rate, and by action error after it."""
    fields = {"objectives": [SUCCESS, OOD], "baselines": ["full_fine_tuning"], "known_strengths": []}
    plan = make_plan(load_sweep(make_sweep(run=ROLLOUTS, **fields)))
    begin_folder(plan, resume=False)
    return plan


def test_the_best_of_a_journal_has_the_highest_success(rollout_plan):
    plan = rollout_plan
    journal = Journal(plan.folder)
    schedules = plan.known()
    names = [dimension.name for dimension in plan.space.dimensions]
    for keys in [(0.1, 0.2, 0.3, 0.4), (0.4, 0.3, 0.2, 0.1), (0.3, 0.1, 0.2, 0.4), (0.2, 0.4, 0.1, 0.3)]:
        schedules.append(plan.drawn(len(schedules), dict(zip(names, (*keys, 1.0), strict=True))))
    # The second beats all in success, the third in the error, the first in neither alone; the last is worse than it.
    values = [(0.0, 0.50), (0.40, 0.30), (0.70, 0.40), (0.20, 0.20), (0.10, 0.45)]
    for schedule, (success, error) in zip(schedules, values, strict=True):
        journal.decide(schedule)
        (trial,) = trials(plan, schedule)
        Tracker.create(trial.run_dir, uri=plan.tracking_uri, experiment="e", run_name=trial.name, ship=False)
        found = {SUCCESS: success, OOD: error}
        journal.end(Ended(trial.name, schedule.number, 0, "finished", 6, found, 1.0))
    record = read_sweep(plan.folder)
    numbers = [result.values[SUCCESS].mean for result in record.ranked()]
    assert numbers == [0.70, 0.40, 0.20, 0.10, 0.0]
    assert {result.values[OOD].mean for result in record.pareto()} == {0.40, 0.30, 0.20}
    text = render(record)
    assert f"most {SUCCESS} against full fine-tuning: 0.7000 and 0.0000" in text and "+70.0 points" in text
    assert f"least {OOD} against full fine-tuning: 0.2000 and 0.5000" in text
    assert "more is better and less is better" in text


def test_the_dry_run_says_what_is_maximised(rollout_plan):
    assert plan_lines(rollout_plan)[0] == f"search: random, minimising {OOD}, maximising {SUCCESS}"


def test_optuna_is_told_the_directions(make_sweep):
    path = make_sweep(run=ROLLOUTS, searcher="tpe", objectives=[SUCCESS, OOD])
    plan = make_plan(load_sweep(path))
    searcher = make_searcher(plan.spec, plan.space)
    assert [direction.name for direction in searcher._ot_study.directions] == ["MAXIMIZE", "MINIMIZE"]
    # By success alone, schedules of little strength do best: the search must go there.
    plan = make_plan(load_sweep(make_sweep(run=ROLLOUTS, searcher="tpe", objectives=[SUCCESS])))
    searcher = make_searcher(plan.spec, plan.space)
    strengths = []
    for number in map(str, range(40)):
        point = searcher.suggest(number)
        strengths.append(point["lambda_max"])
        searcher.on_trial_complete(number, result={SUCCESS: 1 - point["lambda_max"] / 4})
    assert sum(strengths[30:]) < 0.5 * sum(strengths[:10])


def test_halving_ends_the_trials_of_least_success(make_sweep):
    plan = make_plan(load_sweep(make_sweep(run=ROLLOUTS, objectives=[SUCCESS], scheduler={"name": "asha"})))
    judge = Judged(begin_folder(plan, resume=False))
    ends = [judge.report(str(index), 4, success) for index, success in enumerate((0.9, 0.8, 0.1, 0.0))]
    assert ends[0] is False and ends[2:] == [True, True]


def test_a_step_without_rollouts_decides_nothing(make_sweep):
    fields = {"objectives": [SUCCESS], "scheduler": {"name": "asha"}, "known_strengths": [0.5, 1.0, 2.0, 3.0]}
    plan = make_plan(load_sweep(make_sweep(run=ROLLOUTS, **fields)))
    sweep = begin_folder(plan, resume=False)
    search, judge = SweepSearch(sweep), Judged(sweep)
    ended = []
    for number, success in enumerate((0.9, 0.8, 0.1, 0.0)):
        config = search.suggest(str(number))
        run_dir = plan.folder / "trials" / config["trial"]["name"]
        run_dir.mkdir(parents=True)
        record = EvaluationRecord(run_dir)
        record.add(2, {"ood": {"action_l1": 0.5}})
        record.add(4, {"ood": {"action_l1": 0.4}})
        record.add_rollouts(4, {SUCCESS: success})
        trial = SweepTrial.__new__(SweepTrial)
        trial.setup(config, str(plan.folder))
        # The offline evaluation of step 2 had no rollouts.
        result = trial.step()
        assert (result["step"], result["cost"]) == (4, -success)
        ended.append(judge.report(config["trial"]["name"], 4, success))
        record.add(5, {"ood": {"action_l1": 0.3}})
        assert newest_values(run_dir) == {OOD: 0.3, SUCCESS: success}
    assert ended == [False, True, True, True]


def test_a_trial_without_a_success_rate_tells_the_searcher_nothing(make_sweep):
    plan = make_plan(load_sweep(make_sweep(run=ROLLOUTS, objectives=[OOD, SUCCESS], searcher="tpe")))
    search = SweepSearch(begin_folder(plan, resume=False))
    run_dir = plan.folder / "trials" / search.suggest("first")["trial"]["name"]
    run_dir.mkdir(parents=True)
    EvaluationRecord(run_dir).add(2, {"ood": {"action_l1": 0.4}})
    search.on_trial_complete("first", {"status": "running", "step": 2})
    assert search.suggest("second")["trial"]["source"] == "searched"
    states = [trial.state.name for trial in search._searcher("searched")._ot_study.trials]
    assert states == ["FAIL", "RUNNING"]


def test_a_scheduler_needs_rollouts_before_the_last_step(make_sweep):
    at_the_end = {"evaluation": {**ROLLOUTS["evaluation"], "rollouts": {"suites": ["libero_object"]}}}
    path = make_sweep(run=at_the_end, objectives=[SUCCESS], scheduler={"name": "asha"})
    with pytest.raises(SpecError, match=r"the base has evaluation.rollouts.every = 0 .*set evaluation.rollouts.every"):
        make_plan(load_sweep(path))


def test_an_objective_of_a_suite_that_is_not_rolled_out(make_sweep):
    path = make_sweep(run=ROLLOUTS, objectives=["rollout/libero_goal/success"])
    with pytest.raises(SpecError, match=r"no evaluation of the base logs it; did you mean 'rollout/libero_object/suc"):
        make_plan(load_sweep(path))


def test_success_in_and_out_of_distribution_can_be_objectives(make_sweep):
    suites = ["libero_object", "libero_object_swap", "libero_object_lan"]
    run = {"evaluation": {"rollouts": {"suites": suites}}}
    plan = make_plan(load_sweep(make_sweep(run=run, objectives=["rollout/ood/success", "rollout/id/success"])))
    logged = [name for name in logged_metrics(plan.base) if name.startswith("rollout/")]
    sides = ("id", "ood", "ood/position", "ood/language")
    assert logged == [f"rollout/{name}/success" for name in (*suites, *sides)]
    run = {"evaluation": {"rollouts": {"suites": suites[:1]}}}
    with pytest.raises(SpecError, match=r"objectives = 'rollout/ood/success'"):
        make_plan(load_sweep(make_sweep(run=run, objectives=["rollout/ood/success"])))


def test_rollouts_belong_to_the_weights_that_were_evaluated(tmp_path):
    record = EvaluationRecord(tmp_path)
    record.add(2, {})
    record.add_rollouts(2, {SUCCESS: 0.5})
    assert record.rollouts_at(2) == {SUCCESS: 0.5} and record.rollouts_at(4) is None
    # Trained once more up to this step, and evaluated again.
    record.add(2, {"ood": {"action_l1": 0.1}})
    assert record.rollouts_at(2) is None and newest_values(tmp_path) == {OOD: 0.1}


def test_asha_ends_the_poor_ones_at_a_rung_and_never_a_baseline(make_sweep):
    run = {"training": {"max_steps": 40, "checkpoint_every": 40}, "evaluation": {"every": 10}}
    scheduler = {"name": "asha", "options": {"reduction_factor": 2}}
    plan = make_plan(load_sweep(make_sweep(run=run, scheduler=scheduler)))
    judge = Judged(begin_folder(plan, resume=False))
    assert [judge.report(f"t{n}", 10, -float(n)) for n in range(4)] == [False, True, True, True]
    assert judge.report("t0", 20, 0.0) is False
    assert judge.report("better", 10, 1.0) is False
    # A driver that was lost: the next one goes on with what it knew.
    after = Judged(Sweep(plan))
    for name, trial in judge.trials.items():
        after.trials[name] = trial
        after.scheduler.on_trial_add(after, trial)
    after.scheduler.choose_trial_to_run(after)
    rungs = [[dict(rung[1]) for rung in j.scheduler._inner._brackets[0]._rungs] for j in (after, judge)]
    assert rungs[0] == rungs[1] and any(rungs[0])
    # The same evaluation again, as after a resume, changes nothing.
    assert judge.report("better", 10, 1.0) is False
    assert judge.report("plain", 10, -100.0, source="baseline") is False
