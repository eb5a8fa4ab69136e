import math
import subprocess
import sys

import pytest

from maps_ray.proximity.schedule import ScheduleError, frozen_layers, layer_strengths, schedule, strength_table
from maps_ray.proximity.stack import StackError, StackLayer, assign
from maps_ray.spec import ProximitySpec

STACK = [
    StackLayer("dinov2.0", ("dinov2",), r"dino\.0\..*"),
    StackLayer("dinov2.1", ("dinov2",), r"dino\.1\..*"),
    StackLayer("siglip.0", ("siglip",), r"siglip\.0\..*"),
    StackLayer("projector", ("projector",), r"projector\..*"),
    StackLayer("language.0", ("language", "language_early"), r"lm\.0\..*"),
    StackLayer("language.1", ("language", "language_late"), r"lm\.1\..*"),
    StackLayer("action_head", ("action_head",), r"head\..*", pretrained=False),
]
ORDER = ["dinov2", "siglip", "projector", "language"]


def test_linear_falls_from_lambda_max_to_zero_over_the_layers_in_order():
    strengths = schedule(STACK, ORDER, "linear", 2.0, "layer")
    assert list(strengths) == [layer.name for layer in STACK]
    assert list(strengths.values()) == pytest.approx([2.0, 1.6, 1.2, 0.8, 0.4, 0.0, 0.0])


def test_the_order_decides_which_layers_come_first():
    strengths = schedule(
        STACK, ["language_late", "dinov2", "language_early", "projector", "siglip"], "linear", 1, "layer"
    )
    line = ["language.1", "dinov2.0", "dinov2.1", "language.0", "projector", "siglip.0"]
    assert [strengths[name] for name in line] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    assert strengths["action_head"] == 0


def test_cosine_is_a_half_cosine():
    strengths = schedule(STACK, ORDER, "cosine", 3.0, "layer")
    assert [strengths[layer.name] for layer in STACK[:6]] == pytest.approx(
        [1.5 * (1 + math.cos(math.pi * k / 5)) for k in range(6)]
    )


def test_constant_holds_pretrained_layers_alike():
    strengths = schedule(STACK, ORDER, "constant", 0.7, "layer")
    assert strengths == {layer.name: 0.7 if layer.pretrained else 0.0 for layer in STACK}


def test_module_granularity_counts_entries_of_the_order():
    strengths = schedule(STACK, ORDER, "linear", 3.0, "module")
    assert list(strengths.values()) == pytest.approx([3.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("granularity", ["layer", "module"])
def test_a_single_layer_gets_lambda_max(shape, granularity):
    assert schedule(STACK[:1], ["dinov2"], shape, 1.5, granularity) == {"dinov2.0": 1.5}


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (["dinov2", "siglp", "projector", "language"], r"'siglp'.*did you mean 'siglip'.*language_early"),
        (["dinov2", "siglip", "language"], "leaves out projector"),
        (["dinov2", "siglip", "projector", "language_early"], "leaves out language_late"),
        (["dinov2", "siglip", "projector"], "leaves out language:"),
        ([*ORDER, "language_early"], "twice: 'language' and 'language_early' both hold language.0"),
        ([*ORDER, "siglip"], "'siglip' is named twice"),
        ([*ORDER, "action_head"], "'action_head', which has no pretrained weights"),
    ],
)
def test_the_order_must_address_each_pretrained_layer_once(order, message):
    with pytest.raises(ScheduleError, match=message):
        schedule(STACK, order, "linear", 1.0, "layer")


@pytest.mark.parametrize(
    ("shape", "lambda_max", "granularity", "message"),
    [
        ("linaer", 1.0, "layer", "did you mean 'linear'"),
        ("linear", 1.0, "block", "granularity = 'block'"),
        ("linear", -0.1, "layer", "lambda_max = -0.1"),
        ("linear", math.nan, "layer", "lambda_max = nan"),
    ],
)
def test_values_out_of_range_are_refused(shape, lambda_max, granularity, message):
    with pytest.raises(ScheduleError, match=message):
        schedule(STACK, ORDER, shape, lambda_max, granularity)


def test_table_counts_tensors_and_elements():
    stack = [STACK[0], STACK[-1]]
    sizes = {"dino.0.weight": 12, "dino.0.scale": 1, "head.bias": 5}
    owners = assign(stack, sizes)
    strengths = {"dino.0.weight": 1.0, "dino.0.scale": 1.0, "head.bias": 0.0}
    assert strength_table(stack, owners, strengths, sizes) == [
        {"module": "dinov2.0", "strength": 1.0, "tensors": 2, "parameters": 13},
        {"module": "action_head", "strength": 0.0, "tensors": 1, "parameters": 5},
    ]
    strengths["dino.0.scale"] = 0.0
    assert strength_table(stack, owners, strengths, sizes)[0] == {
        "module": "dinov2.0",
        "strength": 1.0,
        "tensors": 2,
        "parameters": 13,
        "strengths": {"1": 1, "0": 1},
    }
    with pytest.raises(StackError, match=r"no layer owns parameter other"):
        assign(stack, {**sizes, "other": 1})


def test_given_strengths_replace_the_schedule():
    spec = ProximitySpec(order=ORDER, lambda_max=1.0, strengths={"siglip": 0.3, "language_late": 0})
    plain = schedule(STACK, ORDER, "linear", 1.0, "layer")
    given = layer_strengths(STACK, spec)
    changed = {name for name in plain if "siglip" in name} | frozen_layers(STACK, ["language_late"])
    assert {given[name] for name in plain if "siglip" in name} == {0.3}
    assert {given[name] for name in frozen_layers(STACK, ["language_late"])} == {0}
    assert all(given[name] == plain[name] for name in plain.keys() - changed)


def test_strengths_and_frozen_modules_must_be_modules():
    with pytest.raises(ScheduleError, match=r"strengths names 'siglp'.*did you mean 'siglip'"):
        layer_strengths(STACK, ProximitySpec(order=ORDER, strengths={"siglp": 1}))
    with pytest.raises(ScheduleError, match=r"'language' and 'language_early' both hold language.0"):
        layer_strengths(STACK, ProximitySpec(order=ORDER, strengths={"language": 1, "language_early": 1}))
    with pytest.raises(ScheduleError, match="freeze names 'action_head'"):
        frozen_layers(STACK, ["action_head"])


def test_frozen_layers_are_marked_in_the_table():
    sizes = {"dino.0.weight": 12, "dino.0.scale": 1, "head.bias": 5}
    stack = [STACK[0], STACK[-1]]
    owners = assign(stack, sizes)
    rows = strength_table(stack, owners, {"head.bias": 0.0}, sizes, {"dino.0.weight", "dino.0.scale"})
    assert [row.get("frozen") for row in rows] == [True, None]
    rows = strength_table(stack, owners, {"head.bias": 0.0, "dino.0.scale": 0.5}, sizes, {"dino.0.weight"})
    assert [row.get("frozen_tensors") for row in rows] == [1, None] and rows[0]["strength"] == 0.5


def test_schedule_does_not_load_torch():
    code = "import sys, maps_ray.proximity.schedule; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
