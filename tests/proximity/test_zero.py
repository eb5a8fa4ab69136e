"""The sharded form under real DeepSpeed engines, in two gloo processes."""

import math

import pytest
import zero_runs
from exactness import TOLERANCE, matrix, run_cases
from processes import in_processes

# A minute on an idle machine; a busy one starts processes slowly.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return in_processes(2, zero_runs.everything, str(tmp_path_factory.mktemp("checkpoints")))


@pytest.mark.parametrize("cases", matrix(quick=True), ids=lambda cases: f"{cases[0].world} processes")
def test_weights_equal_those_of_the_reference(cases):
    results = in_processes(cases[0].world, run_cases, cases)
    assert {result.case: result.error for result in results if not result.passed} == {}
    # Exact without a projection would prove nothing.
    unprojected = ("l2_sp",)
    assert all(result.projection_rate > 0.02 for result in results if result.case.variant not in unprojected)


def test_projecting_shards_as_if_they_were_tensors_would_be_caught(runs):
    for result in runs["wrong"]:
        assert result.own > 100 * TOLERANCE
        assert result.given > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("round robin", "LayoutError: the DeepSpeed configuration has zero_optimization.round_robin_gradients"),
        ("stage 0", "LayoutError: cannot shard under ShardedAdamSPD: set zero_optimization.stage to 1, 2 or 3"),
        ("unbound", "RuntimeError: ShardedAdamSPD has no strengths yet: call bind"),
        ("other optimizer", "BindError: the engine steps another optimizer"),
        ("strengths", "strengths without a parameter: ['nrm.bias']; parameters without a strength: ['norm.bias']"),
        ("negative", "ValueError: strength of norm.bias = -1.0"),
        ("anchor shape", "output.weight: anchor is torch.float32 of shape (19, 37), the parameter (37, 19)"),
        ("anchor nan", "output.weight: anchor has NaN"),
        ("anchor absent", "output.weight: cannot read its anchor: KeyError"),
        ("masters", "its master weights differ from the model's"),
        ("swapped", "bias: its weights do not lie where the layout of the partitions says"),
    ],
)
def test_what_cannot_be_bound_is_refused_in_every_process(runs, what, message):
    assert all(message in said for said in runs["refusals"][what]), runs["refusals"][what]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_strength_zero_is_plain_adam_and_still_measures_drift(runs, stage):
    assert runs["strength_zero"][stage] == (True, True)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_l2_sp_equals_adam_beside_the_written_out_penalty(runs, stage):
    assert runs["l2_sp"][stage] < TOLERANCE


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_statistics_describe_the_whole_tensors(runs, stage):
    found = runs["statistics"][stage]
    assert found["before"] == {}
    assert found["same"]
    # The gain has neither a strength nor an anchor.
    assert set(found["tensors"]) == set(found["drift"]) - {"gain"}
    for name, entry in found["tensors"].items():
        assert entry.drift == pytest.approx(found["drift"][name], rel=1e-6)
        assert entry.anchor_norm == pytest.approx(found["anchor"].get(name, 0.0), rel=1e-12)
        assert entry.ratio is None or (name in found["held"] and 0 <= entry.ratio <= 1)


def test_modules_sum_up_their_tensors(runs):
    found = runs["statistics"][2]
    tensors, modules = found["tensors"], found["modules"]
    drift = math.hypot(tensors["wide.weight"].drift, tensors["wide.bias"].drift)
    anchor = math.hypot(found["anchor"]["wide.weight"], found["anchor"]["wide.bias"])
    assert modules["drift/wide"] == pytest.approx(drift / anchor)
    projected = tensors["wide.weight"].projected + tensors["wide.bias"].projected
    assert modules["projection_rate/wide"] == projected / 2
    # Adapters have no pretrained weights that they could drift from.
    assert "projection_rate/lora_a" in runs["statistics"][1]["modules"]
    assert not any(name.startswith("drift/lora") for name in runs["statistics"][1]["modules"])


@pytest.mark.parametrize("run", [(1, "fp32 accumulation"), (2, ""), (3, "")], ids=str)
def test_the_model_has_the_averaged_weights_for_an_evaluation_and_its_own_after_it(runs, run):
    assert runs["averages"][run] == {"apart": True, "within": True, "behind": True, "forward": True}


@pytest.mark.parametrize("run", [(1, "fp32 accumulation"), (2, ""), (3, "")], ids=str)
def test_a_resumed_run_ends_with_the_same_bits(runs, run):
    same, keys = runs["resumed"][run]
    assert same
    assert keys == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_averages_radii_and_late_starts_go_on_from_a_checkpoint_with_the_same_bits(runs, stage):
    assert runs["restored"][stage]
