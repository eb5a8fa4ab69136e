"""`maps-ray plan`: what is counted, what is proposed, and what it does without checkpoint and data."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_policy import write_base
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from maps_ray.cli import app
from maps_ray.devices import GIB, Device, device_named
from maps_ray.models import create_policy
from maps_ray.models.minivla.config import PolicyConfig as MiniVLAConfig
from maps_ray.models.minivla.tensors import model_shapes as minivla_shapes
from maps_ray.models.minivla.tiny import tiny_config as tiny_minivla
from maps_ray.models.openvla_oft.config import STOCK_CONFIG, PolicyConfig
from maps_ray.models.openvla_oft.tensors import model_shapes
from maps_ray.spec import RunSpec, SpecError, load_spec, parse
from maps_ray.tracking import Tracker
from maps_ray.training.planning.plan import MARGIN, RESERVED, make_plan, rank_needs
from maps_ray.training.planning.profile import _Follower, _fused_attention, run_pass
from maps_ray.training.planning.subject import read_subject
from maps_ray.training.planning.terms import BUCKET, Counts, Setup, needed, terms

JOBS = Path(__file__).parents[2] / "jobs"


def small_spec(folder: Path, **sections: dict[str, Any]) -> Any:
    """A spec whose checkpoint is a configuration alone, and whose data are missing."""
    base = folder / "base"
    if not base.exists():
        base.mkdir()
        write_base(base, ("open the drawer",))
    given = {
        "name": "planned",
        "model": {"checkpoint": str(base), **sections.pop("model", {})},
        "data": {"path": str(folder / "nowhere"), **sections.pop("data", {})},
        "training": {"batch_size": 4, "precision": "fp32", **sections.pop("training", {})},
        **sections,
    }
    return parse(RunSpec, given)


def test_the_published_sizes_are_those_of_the_published_models():
    openvla = PolicyConfig.from_dict(STOCK_CONFIG)
    assert sum(math.prod(shape) for shape in model_shapes(openvla).values()) == 7_541_237_184
    from maps_ray.models import stock_config

    minivla = MiniVLAConfig.from_dict(stock_config("minivla_vq"))
    assert minivla.text["vocab_size"] == 151936 and len(minivla_shapes(minivla)) > 800


def test_counts_are_those_of_the_policy_with_weights(tmp_path):
    spec = small_spec(tmp_path)
    subject = read_subject(spec)
    real = create_policy(json.loads((tmp_path / "base" / "config.json").read_text()), num_images=2, use_proprio=True)
    sizes = {name: parameter.numel() for name, parameter in real.named_parameters()}
    new = sum(numel for name, numel in sizes.items() if name.startswith(("action_head.", "proprio_projector.")))
    counts = subject.counts
    assert counts.trained + counts.frozen == sum(sizes.values())
    assert counts.anchored == counts.trained - new and counts.without_gradient == 0
    assert all(parameter.is_meta for parameter in subject.policy.parameters())

    # What no gradient reaches with weights is not trained: the towers' last blocks, norms and pools, the output head.
    inputs = {name: torch.rand(tensor.shape) if tensor.is_meta else tensor for name, tensor in subject.batch(2).items()}
    real(**inputs).loss.backward()
    idle = {name for name, parameter in real.named_parameters() if parameter.grad is None}
    assert {name for name, parameter in subject.policy.named_parameters() if not parameter.requires_grad} == idle
    assert subject.profile(4).without_gradient == frozenset()
    assert counts.frozen == sum(sizes[name] for name in idle)
    assert any(name.startswith("vision_backbone.featurizer.blocks.") for name in idle)


def test_operations_are_those_of_torchs_counter(tmp_path):
    subject = read_subject(small_spec(tmp_path))
    with FlopCounterMode(display=False) as counter, _fused_attention(), _Follower(list(subject.policy.parameters())):
        subject.policy(**subject.batch(1)).loss.backward()
    assert subject.profile(1).flops == counter.get_total_flops() > 0
    assert subject.profile(4).flops == 4 * counter.get_total_flops()


def test_activations_are_what_torch_keeps_for_the_gradients(tmp_path):
    subject = read_subject(small_spec(tmp_path))
    real = create_policy(subject.raw, num_images=2, use_proprio=True)
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in real.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = {name: torch.rand(tensor.shape) if tensor.is_meta else tensor for name, tensor in subject.batch(4).items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = real(**inputs)
    assert output.loss is not None
    assert subject.profile(4).kept == pytest.approx(sum(kept.values()), rel=0.1)


def test_checkpointing_keeps_less_and_computes_more(tmp_path):
    spec = small_spec(tmp_path)
    plain, again = read_subject(spec), read_subject(spec).changed(checkpointing=True)
    assert again.profile(4).kept < 0.4 * plain.profile(4).kept
    assert again.profile(4).peak < plain.profile(4).peak
    assert again.profile(4).flops > 1.1 * plain.profile(4).flops
    assert again.profile(4).forward_flops == plain.profile(4).forward_flops
    one, four = plain.activations(1), plain.activations(4)
    assert plain.activations(2) == pytest.approx(one + (four - one) / 3, rel=1e-3)


@pytest.mark.parametrize("kind", ["vq", "oft"])
def test_minivla_is_planned(tmp_path, kind):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(tiny_minivla(kind)))
    vq = {"use_proprio": False} if kind == "vq" else {}
    subject = read_subject(small_spec(tmp_path, model={"name": f"minivla_{kind}", **vq}))
    assert subject.profile(2).flops > 0
    # The tied embedding and all layers of the language model learn; what does not learn is not trained.
    assert subject.profile(2).without_gradient == frozenset()
    assert all(p.requires_grad for name, p in subject.policy.named_parameters() if "llm.model" in name)


@pytest.mark.parametrize("head", ["diffusion", "discrete"])
def test_other_heads_are_planned(tmp_path, head):
    subject = read_subject(small_spec(tmp_path, model={"head": head}))
    assert subject.profile(2).flops > 0
    assert subject.profile(2).without_gradient == frozenset()
    assert subject.policy.language_model.lm_head.weight.requires_grad == (head == "discrete")


def test_adapters_hold_what_is_frozen_and_need_no_anchor(tmp_path):
    plain = read_subject(small_spec(tmp_path)).counts
    held = read_subject(small_spec(tmp_path, model={"lora": {"rank": 4}})).counts
    assert held.anchored == 0 and held.trained < plain.trained
    assert held.frozen >= plain.anchored + plain.frozen
    frozen = read_subject(small_spec(tmp_path, proximity={"freeze": ["dinov2"]})).counts
    assert frozen.frozen > plain.frozen and frozen.trained + frozen.frozen == plain.trained + plain.frozen


def test_terms_of_each_stage_by_hand():
    counts = Counts(trained=800, frozen=200, anchored=600, whole=8, without_gradient=0, anchor_bytes=2)
    for stage in (1, 2, 3):
        found = {term.name: term for term in terms(counts, Setup(stage, 4, "bf16", 1), 5000)}
        assert found["weights"].bytes == (2000 if stage < 3 else 2 * (250 + 8))
        assert (found["masters"].bytes, found["moments"].bytes, found["anchors"].bytes) == (800, 1600, 300)
        # All gradients fit into one bucket: stage 2 needs no room for its share of them beside it.
        assert found["gradients"].bytes == {1: 1600, 2: 0, 3: 400}[stage]
        assert found["reduce bucket"].bytes == 2 * BUCKET
        assert found["activations"].bytes == 5000
    sums = {term.name: term for term in terms(counts, Setup(1, 4, "bf16", 2), 0)}
    assert sums["gradients"].bytes == 3200, "BF16_Optimizer adds up in fp32, whole"
    offloaded = terms(counts, Setup(2, 4, "bf16", 1, offload=True), 0)
    assert {term.name for term in offloaded if term.host and term.bytes} >= {"masters", "moments", "anchors"}
    assert needed(offloaded, host=True) > 0
    assert needed(offloaded) < needed(terms(counts, Setup(2, 4, "bf16", 1), 0)) - 800 - 1600


def test_what_a_rank_needs_in_words(tmp_path):
    said = rank_needs(small_spec(tmp_path), 2, cpu=True)
    assert re.fullmatch(r"a rank needs [\d.e-]+ GiB at its worst moment \((\w[\w ]+ [\d.e-]+(, )?){5}\)", said), said
    # On a GPU what lies on the host is not the rank's, and buffers count whole.
    assert "reduce bucket" in rank_needs(small_spec(tmp_path), 2, cpu=False)


def test_fields_of_deepspeed_change_the_plan(tmp_path):
    def choice(**fields):
        spec = small_spec(tmp_path, training={"zero_stage": 3, "deepspeed": fields})
        return make_plan(spec, []).chosen

    cpu = {"device": "cpu"}
    plain, buckets = choice(), choice(reduce_bucket_size=1000, stage3_max_live_parameters=1000)
    assert {term.name: term.bytes for term in buckets.terms}["gathered weights"] <= 4000
    assert plain.device_bytes - buckets.device_bytes > 4 * (BUCKET - 1000)
    moved, all_moved = choice(offload_optimizer=cpu), choice(offload_optimizer=cpu, offload_param=cpu)
    assert plain.device_bytes > moved.device_bytes > all_moved.device_bytes
    assert plain.host_bytes < moved.host_bytes < all_moved.host_bytes


def test_a_rank_needs_its_worst_moment():
    def moments(activations, accumulation=1):
        counts = Counts(trained=1000, frozen=0, anchored=0, whole=0, without_gradient=0, anchor_bytes=4)
        listed = terms(counts, Setup(2, 1, "fp32", accumulation, lazy=True), activations)
        phases = ("always", "gradients", "backward", "reduce", "step")
        held = {p: sum(term.bytes for term in listed if term.phase == p and not term.host) for p in phases}
        return held, needed(listed)

    held, most = moments(activations=10**6)
    assert most == held["always"] + held["gradients"] + held["backward"]
    # One bucket takes all gradients, 4 bytes each, and is flattened into a copy when activations are gone.
    held, most = moments(activations=1000)
    assert (held["gradients"], held["reduce"]) == (4000, 4000)
    assert most == held["always"] + 8000 == held["always"] + held["step"]
    # Sums of several passes lie beside them.
    held, most = moments(activations=1000, accumulation=2)
    assert most == held["always"] + 12000 > held["always"] + held["step"]
    # More than a bucket is reduced while there are activations, and 1/W of it is kept.
    counts = Counts(trained=1000, frozen=0, anchored=0, whole=0, without_gradient=0, anchor_bytes=4)
    several = terms(counts, Setup(2, 2, "fp32", 1, bucket=100, lazy=True), 10**6)
    assert needed(several) - sum(term.bytes for term in several if term.phase == "always" and not term.host) == (
        10**6 + 2000 + 400 + 400
    )


def test_what_does_not_fit_gets_changes_that_do(tmp_path):
    spec = small_spec(tmp_path, training={"batch_size": 8})
    full = make_plan(spec, [device_named("h100-80")]).chosen
    # Bucket and all, a little less than is needed.
    memory = math.ceil((0.999 * full.device_bytes + RESERVED) / (1 - MARGIN) / 2**20)
    tight = Device("tight-1", memory, 100.0, 50.0, 1.0, "tight")
    verdict = make_plan(spec, [tight]).verdicts[0]
    assert not verdict.fits and verdict.proposals
    for changes, choice in verdict.proposals:
        assert choice.device_bytes + RESERVED <= (1 - MARGIN) * tight.memory
        flat = {name.removeprefix("training."): value for name, value in changes.items()}
        assert flat.get("batch_size", 8) * flat.get("gradient_accumulation", 1) == 8
    assert {"training.activation_checkpointing"} in [set(changes) for changes, _ in verdict.proposals]
    none = Device("tiny-1", 1, 100.0, 50.0, 1.0, "tiny")
    assert make_plan(spec, [none]).verdicts[0].proposals == []


def test_time_follows_from_operations_or_from_a_run(tmp_path):
    spec = small_spec(tmp_path, training={"max_steps": 100}, cluster={"workers": 2})
    device = device_named("h100-80")
    plan = make_plan(spec, [device], ranks=4, utilisation=0.5)
    samples = 100 * 4 * 4
    seconds = samples * plan.chosen.hardware_flops / (4 * 0.5 * device.peak_flops("fp32"))
    assert plan.verdicts[0].seconds == pytest.approx(seconds)
    assert plan.verdicts[0].gpu_hours == pytest.approx(4 * seconds / 3600)

    run = tmp_path / "run"
    tracker = Tracker.create(run, uri="sqlite:///unused.db", experiment="plan", run_name="run", ship=False)
    for step, rate in enumerate([1.0, 1.0, 10.0, 10.0], 1):
        tracker.metrics(step, {"train/samples_per_second": rate})
    from maps_ray.spec import dump

    (run / "spec.yaml").write_text(dump(spec))
    measured = make_plan(spec, [device], ranks=4, measured=run)
    assert measured.verdicts[0].samples_per_second == pytest.approx(10.0 / 2 * 4)
    with pytest.raises(SpecError, match=r"--measured.*no run can be read"):
        make_plan(spec, [device], measured=tmp_path / "none")


def test_model_operations_leave_out_what_is_computed_twice(tmp_path):
    spec = small_spec(tmp_path)
    plain = make_plan(spec, [])
    again = make_plan(small_spec(tmp_path, training={"activation_checkpointing": True}), [])
    assert again.model_flops == pytest.approx(plain.model_flops)
    assert again.chosen.hardware_flops > plain.chosen.hardware_flops == plain.model_flops


def test_the_command_plans_without_checkpoint_and_data(tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text("name: lost\nmodel: {checkpoint: base}\ndata: {path: gone}\ntraining: {batch_size: 2}\n")
    (tmp_path / "base").mkdir()
    write_base(tmp_path / "base", ("open the drawer",))
    result = CliRunner().invoke(
        app, ["plan", str(spec), "--device", "h100-80", "--devices", "8", "--json", "--price", "2"]
    )
    assert result.exit_code == 0, result.output
    said = json.loads(result.output)
    assert said["ranks"] == 8 and set(said["stages"]) == {"1", "2", "3"}
    assert said["devices"][0]["cost"] == pytest.approx(2 * said["devices"][0]["gpu_hours"])
    assert any("no data set" in text and "action_dim 7, proprio_dim 8" in text for text in said["assumptions"])
    for stage in said["stages"].values():
        assert stage["device_bytes"] > 0 and {"weights", "masters", "moments", "activations"} <= {
            term["name"] for term in stage["terms"]
        }
    table = CliRunner().invoke(app, ["plan", str(spec)])
    assert table.exit_code == 0 and "h200-141" in table.output and "moments" in table.output


def test_bad_input_names_the_option():
    result = CliRunner().invoke(app, ["plan", str(JOBS / "tiny.yaml"), "--device", "tpu", "--utilisation", "2"])
    assert isinstance(result.exception, SpecError)
    device, share = (str(problem) for problem in result.exception.problems)
    assert "--device = 'tpu'" in device and "known: rtx3090-24" in device and "h200-141" in device
    assert "--utilisation = 2.0: must be more than 0" in share


def test_a_broken_configuration_is_no_missing_one(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{")
    with pytest.raises(SpecError, match=r"model.checkpoint.*cannot read"):
        read_subject(small_spec(tmp_path))


@pytest.mark.slow
def test_the_papers_specs_are_planned():
    for name, parameters in (("libero_openvla_oft", 7_820_001_479), ("bridge_minivla_vq", 1_252_496_448)):
        plan = make_plan(load_spec(JOBS / "paper" / f"{name}.yaml"), [device_named("a40-48")])
        counts = plan.subject.counts
        assert counts.trained + counts.frozen == parameters
        assert plan.verdicts[0].fits
        assert any("published base model" in text for text in plan.assumptions)
    assert plan.chosen.device_bytes < 40 * GIB


def test_a_pass_leaves_no_hooks_and_no_gradients(tmp_path):
    subject = read_subject(small_spec(tmp_path))
    first = run_pass(subject.policy, subject.batch(2), 2)
    assert run_pass(subject.policy, subject.batch(2), 2) == first
    assert all(parameter.grad is None for parameter in subject.policy.parameters())
    with pytest.raises(AttributeError):
        run_pass(torch.nn.Linear(2, 2, device="meta"), {"input": torch.empty(1, 2, device="meta")}, 1)
    assert torch.nn.functional.scaled_dot_product_attention.__module__ != "maps_ray.training.planning.profile"
