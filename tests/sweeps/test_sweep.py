"""One real sweep, from its spec to the report, and what is in its folder afterwards."""

from __future__ import annotations

import json

import pytest
import torch

from maps_ray.models import load_policy
from maps_ray.sweeps.driver import run_sweep
from maps_ray.sweeps.journal import Journal
from maps_ray.sweeps.plan import make_plan
from maps_ray.sweeps.rerun import spec_of_trial
from maps_ray.sweeps.spec import load_sweep
from maps_ray.tracking.history import read_history
from maps_ray.training.train import train

RUN = {"evaluation": {"every": 2, "batch_size": 4, "max_samples": 4}}
FIELDS = {"budget": {"trials": 2}, "baselines": ["freeze_siglip"], "max_concurrent": 1}


@pytest.fixture
def swept(ray_session, make_sweep):
    plan = make_plan(load_sweep(make_sweep(run=RUN, **FIELDS)))
    result = run_sweep(plan, show=False)
    assert result.status == "finished" and result.trials == 3
    return plan


def test_a_sweep_from_spec_to_report(swept):
    folder = swept.folder
    journal = Journal(folder)
    searched = next(s for s in journal.schedules.values() if s.source == "searched")
    assert [s.source for s in journal.schedules.values()] == ["known", "baseline", "searched"]
    assert {ended.status for ended in journal.ended.values()} == {"finished"}
    for name, ended in journal.ended.items():
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
    assert again.trials == 3 and (folder / "journal.jsonl").read_text() == recorded
