"""Everything that can be wrong with a sweep is said before a cluster starts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.tune.experiment import Trial
from sweep_trials import trials
from typer.testing import CliRunner

from maps_ray.cli import app
from maps_ray.spec import SpecError, read_yaml
from maps_ray.spec.sweep_spec import SchedulerSpec, load_sweep
from maps_ray.sweeps.callbacks import Recorder, View
from maps_ray.sweeps.dry_run import first_schedules, plan_data, plan_lines
from maps_ray.sweeps.folder import Sweep, begin_folder
from maps_ray.sweeps.journal import Ended
from maps_ray.sweeps.plan import make_plan
from maps_ray.sweeps.search import SweepSearch
from maps_ray.sweeps.searchers import make_searcher
from maps_ray.sweeps.space import load_space
from maps_ray.sweeps.trial import SweepTrial
from maps_ray.training.train import StopOnSignal

ROOT = Path(__file__).parents[2]
EVERY = {"evaluation": {"every": 2, "batch_size": 4, "max_samples": 4}}
BASELINES = [
    "full_fine_tuning",
    "uniform_spd",
    "l2_sp",
    "freeze_dinov2",
    "freeze_siglip",
    "freeze_vision",
    "freeze_language",
    "freeze_language_early",
    "freeze_language_late",
]


def faults(path: Path) -> str:
    with pytest.raises(SpecError) as caught:
        make_plan(load_sweep(path))
    return str(caught.value)


def space(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "space.yaml").write_text(text)
    return [str(tmp_path / "space.yaml")]


def test_no_sweep_is_run_through_a_client(make_sweep, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://10.0.0.1:10001")
    found = faults(make_sweep())
    assert "cluster.address = 'ray://10.0.0.1:10001': Ray Tune" in found and "python jobs/submit.py" in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "order: {groups: [dinov2, siglp+projector, language]}",
            r"space.order = .*'siglp', which is no module of this model: did you mean 'siglip'",
        ),
        ("order: {groups: [dinov2, siglip, language]}", "leaves out projector"),
        ("lambda_max: {low: 2, high: 2}", r"space.lambda_max = .*empty range: low \(2\) must be less than high \(2\)"),
        ("lambda_max: {low: 0, high: 2, scale: log}", "a logarithmic range must begin above 0"),
        ("lambda_max: {values: []}", "space.lambda_max.values"),
        ("lamda_max: {low: 0, high: 2}", "space.lamda_max = .*did you mean 'lambda_max'"),
        ("strengths: {groups: [dinov2, siglip], low: 0, high: 1}", "leaves out projector, language: each"),
        ("strengths: {groups: [dinov2], low: 0, high: 1}\nshape: [linear]", "free strengths replace the schedule"),
        (
            "order: {first: [dinov2], groups: [dinov2+siglip, projector, language]}",
            r"space.order = \{'groups': .*'first': \['dinov2'\]\}: module named twice: dinov2",
        ),
        ("{}", "varies nothing"),
    ],
)
def test_a_space_that_does_not_fit(make_sweep, tmp_path, text, message):
    assert_says(faults(make_sweep(space=space(tmp_path, text))), message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"space": ["oders"]}, "space = 'oders': no such file, and no such name in tune_spaces"),
        ({"budget": {"trials": 0}}, "num_samples = 0"),
        ({"num_samples": 0}, "num_samples = 0"),
        ({"budget": {"hours": 3}}, "budget is no section any more: give num_samples, time_budget_s or worker_hours"),
        ({"budget": {}}, "a sweep must end"),
        ({"budget": {"trials": 2}, "known_strengths": [1, 2, 3]}, "less than the 3 schedules of known_strengths"),
        (
            {"budget": {"worker_hours": 0.001}, "seconds_per_step": 60},
            r"below one trial, which takes about 0\.100? work",
        ),
        (
            {"num_samples": None, "time_budget_s": 30, "seconds_per_step": 60},
            r"time_budget_s = 30.0: below one trial, whose steps take about 360 s: raise the budget",
        ),
        ({"workers_per_trial": 999}, r"workers_per_trial = 999: .*but this machine has"),
        (
            {"objectives": ["eval/ood/action_l2"]},
            "no evaluation of the base logs it; did you mean 'eval/ood/action_l1'",
        ),
        ({"baselines": ["freeze_dino"]}, "baselines = 'freeze_dino': unknown; did you mean 'freeze_dinov2'"),
        ({"scheduler": {"name": "asha"}}, r"the base has evaluation.every = 0 .*set evaluation.every"),
        ({"searcher": "grid"}, "lambda_max: a grid needs `values`"),
        ({"overrides": ["model.checkpoint=/nowhere"]}, "base: model.checkpoint = '/nowhere'"),
        ({"measured_run": "gone"}, "measured_run"),
        (
            {"budget": {"worker_hours": 1}, "overrides": ["cluster.autoscaling=true"]},
            "max_concurrent = None: the cluster grows with the trials at once",
        ),
    ],
)
def test_a_sweep_that_cannot_run(make_sweep, fields, message):
    assert_says(faults(make_sweep(**fields)), message)


def assert_says(text: str, message: str) -> None:
    import re

    assert re.search(message, text), text


def test_a_sweep_takes_no_run_for_its_folder(make_sweep):
    plan = make_plan(load_sweep(make_sweep()))
    plan.folder.mkdir(parents=True)
    (plan.folder / "spec.yaml").write_text("name: swept\n")
    with pytest.raises(SpecError, match=r"name = 'swept': .* is the folder of a run of `maps-ray train`"):
        begin_folder(plan, resume=False)
    assert [path.name for path in plan.folder.iterdir()] == ["spec.yaml"]


def test_a_resumed_sweep_shows_what_has_changed(make_sweep):
    begin_folder(make_plan(load_sweep(make_sweep())), resume=False)
    with pytest.raises(SpecError, match=r"exists already; continue that sweep with --resume swept"):
        begin_folder(make_plan(load_sweep(make_sweep())), resume=False)
    begin_folder(make_plan(load_sweep(make_sweep(budget={"trials": 9}))), resume=True)
    changed = make_sweep(seed=3, overrides=["training.learning_rate=0.5"])
    with pytest.raises(SpecError) as caught:
        begin_folder(make_plan(load_sweep(changed)), resume=True)
    said = str(caught.value)
    assert "seed = 3: the sweep was started with 0" in said
    assert "base: training.learning_rate = 0.5: the sweep was started with 0.001" in said
    assert len(said.splitlines()) == 2


def test_a_sweep_goes_on_wherever_its_inputs_lie(make_sweep, base, tmp_path):
    begin_folder(make_plan(load_sweep(make_sweep())), resume=False)
    moved = shutil.copytree(base, tmp_path / "moved")
    fields = {"overrides": [f"model.checkpoint={moved}"]}
    begin_folder(make_plan(load_sweep(make_sweep(**fields))), resume=True)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"note": "another"}))
    with pytest.raises(SpecError, match=r"model.checkpoint = .*started with other content.*1 changed \(config.json\)"):
        begin_folder(make_plan(load_sweep(make_sweep(**fields))), resume=True)


def test_nothing_to_resume(make_sweep):
    plan = make_plan(load_sweep(make_sweep()))
    with pytest.raises(SpecError, match="nothing to resume"):
        begin_folder(plan, resume=True)
    begin_folder(plan, resume=False)
    (plan.folder / "sweep.json").write_text('{"name": ')
    with pytest.raises(SpecError, match=r"sweep.json = .*cannot be read .*: bring it back as it was, or start"):
        begin_folder(plan, resume=True)
    result = CliRunner().invoke(app, ["sweep", "--resume", "nowhere"])
    assert isinstance(result.exception, SpecError) and "no sweep there" in str(result.exception)


def test_known_schedules_and_baselines_come_first(make_sweep):
    plan = make_plan(load_sweep(make_sweep(known_strengths=[0.5, 1.0, 9.0], baselines=BASELINES)))
    found = list(first_schedules(plan))
    assert [s.label for s in found[:3]] == ["DSPEL"] * 3 and [s.label for s in found[3:12]] == BASELINES
    # The space holds the paper's order, and strengths up to 4.
    assert [s.point is not None for s in found[:3]] == [True, True, False]
    assert plan.space.decode(found[0].point) == {
        "order": ["dinov2", "siglip", "projector", "language_early", "language_late"],
        "lambda_max": 0.5,
    }
    assert found[12].source == "searched" and len(found) == 13
    facts = {s.label: plan.resolved(s.proximity) for s in found[3:12]}
    assert set(facts["full_fine_tuning"].strengths.values()) == {0}
    assert facts["freeze_vision"].frozen == ("dinov2", "siglip")
    assert set(facts["uniform_spd"].strengths.values()) == {1}
    assert len({plan.identity(s.proximity) for s in found[3:12]}) == len(BASELINES)
    assert list(plan.resolved(found[0].proximity).positions.values()) == [1, 2, 3, 4, 5]


def test_trials_are_runs_of_their_own(make_sweep):
    plan = make_plan(load_sweep(make_sweep(seeds=2, baselines=["l2_sp"])))
    known, baseline = (trials(plan, schedule) for schedule in plan.known())
    assert [t.name for t in known + baseline] == ["DSPEL-000-s0", "DSPEL-000-s1", "l2_sp-s0", "l2_sp-s1"]
    assert [t.training.seed for t in known] == [0, 1]
    assert known[0].run_dir == plan.folder / "trials" / "DSPEL-000-s0"
    assert baseline[0].proximity.l2_sp > 0 and baseline[0].proximity.lambda_max == 0


def test_cost_is_unknown_unless_a_step_was_measured(make_sweep):
    assert "cost: unknown" in plan_lines(make_plan(load_sweep(make_sweep())))[-1]
    spec = load_sweep(make_sweep(seconds_per_step=6, budget={"trials": 5}, seeds=2, baselines=["l2_sp"]))
    # 6 steps of 6 s on one worker; 5 schedules and a baseline, twice each.
    assert plan_lines(make_plan(spec))[-1] == "cost: 0.12 worker-hours for 12 trials"


def test_the_command_prints_the_plan_without_torch(make_sweep):
    path = make_sweep(searcher="tpe", run=EVERY, scheduler={"name": "asha"})
    code = "import sys; from maps_ray.cli import app; app(sys.argv[1:], standalone_mode=False); "
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "sweep", str(path), "--dry-run"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "DSPEL" in done.stdout and "search: tpe, asha, minimising eval/ood/action_l1" in done.stdout


def test_the_plan_as_json_has_the_strengths_of_the_table(make_sweep):
    data = plan_data(make_plan(load_sweep(make_sweep(searcher="tpe", run=EVERY))))
    data = json.loads(json.dumps(data))
    first = data["schedules"][0]
    assert list(first["strengths"]) == ["dinov2", "siglip", "projector", "language_early", "language_late"]
    assert all(0 <= strength <= 1 for strength in first["strengths"].values())
    assert data["notes"] == plan_lines(make_plan(load_sweep(make_sweep(searcher="tpe", run=EVERY))))


@pytest.mark.parametrize("name", ["sweep_orders", "sweep_tiny", "sweep_merge", "sweep_pbt", "sweep_recipes"])
def test_the_bundled_sweeps_name_what_is_there(name):
    spec = load_sweep(ROOT / "jobs" / f"{name}.yaml")
    assert [Path(file).parent for file in spec.space] == [ROOT / "tune_spaces"] * len(spec.space)
    assert set(spec.baselines) <= yaml.safe_load((ROOT / "tune_spaces" / "baselines.yaml").read_text()).keys()
    assert load_space(spec.space).grid_size in (None, spec.num_samples)


def test_recipes_are_searched_beside_every_baseline():
    all_of_them = yaml.safe_load((ROOT / "tune_spaces" / "baselines.yaml").read_text()).keys()
    named = load_sweep(ROOT / "jobs" / "sweep_recipes.yaml").baselines
    # Two of them are what is searched; and some are meant for the longer runs of jobs/evidence alone.
    longer = {name for path in (ROOT / "jobs/evidence").glob("*.yaml") for name in read_yaml(path).get("baselines", ())}
    assert all_of_them - {"maps_paper", "maps_released"} - longer <= set(named) <= all_of_them


def test_a_baseline_may_change_the_training_and_says_what_does_not_fit(make_sweep, tmp_path):
    names = ["adamw_released", "layer_decay", "ema", "spd_on_vision", "freeze_language_last", "maps_released"]
    plan = make_plan(load_sweep(make_sweep(baselines=names, known_strengths=[])))
    found = {schedule.label: trials(plan, schedule)[0] for schedule in plan.known()}
    assert found["adamw_released"].training.weight_decay == 0.01 and found["layer_decay"].training.layer_decay == 0.9
    assert found["ema"].evaluation.averaged and found["ema"].training.ema == 0.99
    assert found["ema"].training.max_steps == plan.base.training.max_steps and found["ema"].proximity.lambda_max == 0
    assert (
        found["spd_on_vision"].training == plan.base.training and found["maps_released"].proximity.recipe == "released"
    )
    assert len({plan.identity(schedule.proximity) for schedule in plan.known()}) == len(names)
    with pytest.raises(SpecError, match=r"baselines: lp_ft\..*freeze_until.step \(30\) must be less than max_steps"):
        make_plan(load_sweep(make_sweep(baselines=["lp_ft"])))


def test_schedules_that_train_alike_are_one_and_no_others(make_sweep, tmp_path):
    """What may tell two baselines apart: rates, other sections, and orders that something beside strengths follows."""
    chosen = {
        "plain": {"lambda_max": 0},
        "same": {"lambda_max": 0, "order": ["language", "projector", "siglip", "dinov2"], "training": {"ema": None}},
        "decay": {"lambda_max": 0, "training": {"weight_decay": 0.01}},
        "more_decay": {"lambda_max": 0, "training": {"weight_decay": 0.02}},
        "rates": {"lambda_max": 0, "training": {"layer_decay": 0.9}},
        "rates_turned": {
            "lambda_max": 0,
            "order": ["language", "projector", "siglip", "dinov2"],
            "training": {"layer_decay": 0.9},
        },
        "l2": {"lambda_max": 0, "l2_sp": {"strength": 0.01, "shape": "linear"}},
        "l2_turned": {
            "lambda_max": 0,
            "order": ["language", "projector", "siglip", "dinov2"],
            "l2_sp": {"strength": 0.01, "shape": "linear"},
        },
        "adapters": {"lambda_max": 0, "model": {"lora": {"rank": 2}}},
        "wider": {"lambda_max": 0, "model": {"lora": {"rank": 4}}},
        "eager": {"lambda_max": 0, "model": {"attention": "eager"}},
        "learned": {"shape": "learned"},
        "learned_slowly": {"shape": "learned", "radius_rate": 0.001},
        "uniform": {"shape": "constant"},
        "released": {"shape": "constant", "recipe": "released"},
    }
    spaces = space(tmp_path, "lambda_max: {values: [0, 2]}")
    (tmp_path / "baselines.yaml").write_text(yaml.safe_dump(chosen))
    fields = {"space": spaces, "baselines": list(chosen), "known_strengths": []}
    plan = make_plan(load_sweep(make_sweep(**fields)))
    found: dict[str, list[str]] = {}
    for name in chosen:
        found.setdefault(plan.identity(chosen[name]), []).append(name)
    assert [names for names in found.values() if len(names) > 1] == [["plain", "same"]]
    # The search finds plain fine-tuning among its points, and takes the baseline's result for it.
    assert plan.identity({"lambda_max": 0.0}) == plan.identity(chosen["plain"])
    trained = {name: trials(plan, s)[0] for name, s in zip(chosen, plan.known(), strict=True)}
    assert trained["wider"].model.lora.rank == 4 and trained["eager"].model.attention == "eager"
    chosen = {"other": {"model": {"checkpoint": "/elsewhere"}}, "none": {"model": {"lora": {"targets": ["qproj"]}}}}
    (tmp_path / "baselines.yaml").write_text(yaml.safe_dump(chosen))
    said = faults(make_sweep(**{**fields, "baselines": ["other", "none"]}))
    assert "baselines: other.model = " in said and "leave out checkpoint" in said
    assert "baselines: none.model.lora.targets = 'qproj': no layer has such a name; did you mean 'q_proj'" in said


def test_a_folder_of_the_earlier_driver_goes_on(make_sweep):
    """Sweeps from before they ran on Ray Tune: `budget`, a searcher by its name alone, ends in the journal alone."""
    spec = load_sweep(make_sweep(num_samples=3, run=EVERY, scheduler={"name": "asha"}))
    plan = make_plan(spec)
    begin_folder(plan, resume=False)
    raw = json.loads((plan.folder / "sweep.json").read_text())
    for name in ("num_samples", "time_budget_s", "worker_hours", "callbacks", "merge"):
        del raw[name]
    raw |= {"budget": {"trials": 3, "worker_hours": None}, "searcher": "random"}
    raw["scheduler"] = {"name": "asha", "grace_steps": None, "reduction_factor": None}
    (plan.folder / "sweep.json").write_text(json.dumps(raw))
    (plan.folder / "lanes").mkdir()
    known = plan.known()[0]
    searched = plan.drawn(1, make_searcher(spec, plan.space).suggest("1"))
    lines = []
    for schedule in (known, searched):
        facts = {"number": schedule.number, "source": schedule.source, "label": schedule.label}
        facts |= {"proximity": schedule.proximity, "point": schedule.point, "same_as": None}
        lines.append({"kind": "schedule", "schedule": facts})
    ended = {"trial": searched.tag, "schedule": 1, "seed": 0, "status": "stopped early", "step": 4}
    ended |= {"values": {"eval/ood/action_l1": 0.5}, "seconds": 3.0, "error": None}
    lines.append({"kind": "ended", "ended": ended})
    (plan.folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    resumed = make_plan(load_sweep(make_sweep(num_samples=3, run=EVERY, scheduler={"name": "asha"})))
    search = SweepSearch(begin_folder(resumed, resume=True))
    configs = [search.suggest(str(number)) for number in range(3)]
    assert search.suggest("more") == search.FINISHED
    assert [c["trial"]["name"] for c in configs[:2]] == [known.tag, searched.tag]
    assert configs[1]["lambda_max"] == searched.point["lambda_max"] and configs[2]["lambda_max"] > 0
    trial = SweepTrial.__new__(SweepTrial)
    trial.setup(configs[1], str(plan.folder))
    # It answers from the record, and does not train.
    assert trial.step() == {
        "step": 4, "cost": 0.5, "eval/ood/action_l1": 0.5, "status": "stopped early", "done": True
    }  # fmt: skip


def test_a_searcher_that_was_stored_before_tunes_trials_goes_on(make_sweep, tmp_path):
    """Tune stores one after the other; a driver that is lost in between leaves an older searcher."""
    plan = make_plan(load_sweep(make_sweep(searcher="optuna", num_samples=3, run=EVERY)))
    sweep = begin_folder(plan, resume=False)
    search = SweepSearch(sweep)
    configs = {"a": search.suggest("a"), "b": search.suggest("b")}
    search.save(str(tmp_path / "searcher"))
    configs["c"] = search.suggest("c")
    name = configs["a"]["trial"]["name"]
    sweep.journal.end(Ended(name, 0, 0, "finished", 6, {"eval/ood/action_l1": 0.5}, 1.0))
    stored = [Trial("stub", stub=True, config=config, trial_id=number) for number, config in configs.items()]
    stored[0].set_status(Trial.TERMINATED)
    again = SweepSearch()
    running = []
    again.attach(Sweep(plan), lambda count: running.append(count) or True, lambda: 0.0, stored)
    again.restore(str(tmp_path / "searcher"))
    # Nothing is begun twice, two are held to be running, and the searcher knows what the first one measured.
    assert again.suggest("d") == again.FINISHED and running == [2]
    found = again._searcher("searched")._ot_study.trials
    assert [trial.state.name for trial in found] == ["COMPLETE", "RUNNING", "RUNNING"] and found[0].value == 0.5
    again.on_trial_complete("b", {"status": "finished"})


def test_a_sweep_whose_working_directory_is_lost(make_sweep, tmp_path, monkeypatch):
    """As that of a job whose node is lost: Tune asks for it when it reads its own files at the end."""
    plan = make_plan(load_sweep(make_sweep()))
    recorder = Recorder()
    recorder.attach(begin_folder(plan, resume=False), None, StopOnSignal(), View(plan, shown=False))
    (tmp_path / "lost").mkdir()
    monkeypatch.chdir(tmp_path / "lost")
    recorder.on_experiment_end([])
    assert Path.cwd() == tmp_path / "lost"
    (tmp_path / "lost").rmdir()
    recorder.on_experiment_end([])
    assert Path.cwd() == plan.folder
    # A trial's actor is not there: Tune asks for the working directory before it hands it the next trial.
    monkeypatch.chdir(tmp_path)
    config = SweepSearch(begin_folder(plan, resume=True)).suggest("0")

    class Here(SweepTrial):
        def setup(self, config):
            super().setup(config, str(plan.folder))

    Here(config)
    assert Path.cwd() == plan.folder


def test_former_fields_of_asha_beside_options_that_are_none():
    spec = SchedulerSpec.model_validate({"name": "asha", "grace_steps": 2, "options": None})
    assert spec.options == {"grace_period": 2}
    with pytest.raises(ValueError, match="options"):
        SchedulerSpec.model_validate({"name": "asha", "grace_steps": 2, "options": [1]})
