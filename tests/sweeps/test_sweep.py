"""One real sweep, from its spec to the report, and what is in its folder afterwards."""

from __future__ import annotations

import json

import pytest
import torch

from maps_ray.models import load_policy
from maps_ray.spec.sweep_spec import load_sweep
from maps_ray.sweeps.command import spec_of_trial
from maps_ray.sweeps.driver import run_sweep
from maps_ray.sweeps.journal import Journal
from maps_ray.sweeps.plan import make_plan
from maps_ray.tracking.spool import read_history
from maps_ray.training.train import train

RUN = {"evaluation": {"every": 2, "batch_size": 4, "max_samples": 4}}
MERGE = {"weights": {"dinov2": {"values": [1.0, 0.5]}}, "num_samples": 2}
FIELDS = {"budget": {"trials": 2}, "baselines": ["freeze_siglip"], "max_concurrent": 1, "merge": MERGE}


@pytest.fixture
def swept(ray_session, make_sweep):
    plan = make_plan(load_sweep(make_sweep(run=RUN, **FIELDS)))
    result = run_sweep(plan, show=False)
    assert result.status == "finished" and result.trials == 5
    return plan


def check_merges(plan, journal):
    """The best schedule's weights at two points, evaluated and not trained; as trained they measure what they did."""
    name = "eval/ood/action_l1"
    found = [s for s in journal.schedules.values() if s.source == "merged" and s.same_as is None]
    merged = {s.proximity["merge"]["weights"]["dinov2"]: s for s in found}
    assert sorted(merged) == [0.5, 1.0] and len(journal.merged) == 1
    best = min((journal.ended[t] for t in ("DSPEL-000", *journal.merged)), key=lambda ended: ended.values[name])
    values = {share: journal.ended[s.tag].values for share, s in merged.items()}
    assert best.trial == journal.merged[0] and values[1.0] == best.values and values[0.5] != best.values
    for share, schedule in merged.items():
        run_dir = plan.folder / "trials" / schedule.tag
        history = read_history(run_dir)
        assert history.status == "FINISHED" and "train/loss" not in history.metrics
        assert history.metrics[name] == [(6, values[share][name])] and history.params["merge_of"] == best.trial
        assert float(history.params["merge_dinov2"]) == share and history.identity.parent == str(plan.folder)
        assert not (run_dir / "final").exists() and not (run_dir / "checkpoints").exists()


def test_a_sweep_from_spec_to_report(swept):
    folder = swept.folder
    journal = Journal(folder)
    searched = next(s for s in journal.schedules.values() if s.source == "searched")
    assert [s.source for s in journal.schedules.values()][:3] == ["known", "baseline", "searched"]
    check_merges(swept, journal)
    assert {ended.status for ended in journal.ended.values()} == {"finished"}
    for name, ended in list(journal.ended.items())[:3]:
        run_dir = folder / "trials" / name
        history = read_history(run_dir)
        assert history.status == "FINISHED" and ended.step == 6
        assert history.metrics["eval/ood/action_l1"][-1] == (6, ended.values["eval/ood/action_l1"])
        assert [step for step, _ in history.metrics["train/loss"]] == [1, 2, 3, 4, 5, 6]
        assert history.identity.parent == str(folder)
        assert json.loads((run_dir / "result.json").read_text())["status"] == "finished"
    params = read_history(folder / "trials" / f"{searched.label}-002").params
    assert params["order_code"] == searched.label and len(searched.label) == 5
    modules = ("dinov2", "siglip", "projector", "language_early", "language_late")
    assert sorted(params[f"pos_{module}"] for module in modules) == ["1", "2", "3", "4", "5"]
    assert float(params["lambda_dinov2"]) >= 0

    frozen = folder / "trials" / "freeze_siglip"
    drift = read_history(frozen).metrics
    assert {value for _, value in drift["drift/siglip"]} == {0.0} and drift["drift/dinov2"][-1][1] > 0
    trained, start = (
        load_policy(path, dtype=torch.float32, num_images=2, use_proprio=True)
        for path in (frozen / "final", swept.base.model.checkpoint)
    )
    # The base has no head of its own: what it has is the backbone.
    before = {name: p for name, p in start.named_parameters() if name.startswith("vision_backbone")}
    moved = {name.split(".")[1] for name, p in before.items() if not torch.equal(p, trained.get_parameter(name))}
    assert moved == {"featurizer"}

    counts = [json.loads(line) for line in (folder / "timeline.jsonl").read_text().splitlines()]
    assert max(line["running"] for line in counts) == 1 and counts[-1]["running"] == counts[-1]["pending"] == 0

    # A worker that has run other trials before gives what a fresh one gives.
    trial = journal.ended[f"{searched.label}-002"]
    alone = train(spec_of_trial(f"{folder}/{trial.trial}"), progress=False)
    assert alone.metrics["eval/ood/action_l1"] == trial.values["eval/ood/action_l1"]

    recorded = (folder / "journal.jsonl").read_text()
    again = run_sweep(swept, resume=True, show=False)
    assert again.trials == 5 and (folder / "journal.jsonl").read_text() == recorded
