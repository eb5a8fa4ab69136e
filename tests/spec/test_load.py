"""Reading run specs: every fault is found at once and says field, value and remedy."""

from pathlib import Path

import pytest

from maps_ray.spec import RunSpec, SpecError, dump, load_spec

MINIMAL = "name: run\nmodel: {checkpoint: base}\ndata: {path: demos}\n"


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str) -> Path:
        path = tmp_path / "spec.yaml"
        path.write_text(text)
        return path

    return _write


def faults(path: Path, *overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        load_spec(path, overrides)
    return str(caught.value)


def test_minimal_spec_has_defaults(write):
    spec = load_spec(write(MINIMAL))
    assert spec.proximity.order == ["dinov2", "siglip", "projector", "language"]
    assert spec.training.zero_stage == 2
    assert spec.run_dir == Path.cwd() / "runs/run"


def test_file_paths_are_relative_to_the_file_and_overrides_to_the_working_directory(write):
    path = write(MINIMAL)
    spec = load_spec(path, ["data.path=elsewhere"])
    assert spec.model.checkpoint == path.parent / "base"
    assert spec.data.path == str(Path.cwd() / "elsewhere")


def test_a_spec_builds_on_another(write):
    path = write("base: below/base.yaml\nname: mine\ntraining: {max_steps: 7}\ndata: {cameras: [image]}\n")
    below = path.parent / "below"
    below.mkdir()
    (below / "base.yaml").write_text("base: ../root.yaml\ntraining: {max_steps: 5, batch_size: 3}\n")
    (path.parent / "root.yaml").write_text(
        "name: root\nmodel: {checkpoint: base}\ntraining: {seed: 4}\n"
        "data: {path: demos, cameras: [image, wrist_image]}\n"
    )
    spec = load_spec(path, ["training.batch_size=2"])
    assert (spec.name, spec.data.cameras) == ("mine", ["image"])
    assert (spec.training.max_steps, spec.training.batch_size, spec.training.seed) == (7, 2, 4)
    # A path belongs to the file that gives it, wherever the file that builds on it lies.
    assert spec.model.checkpoint == path.parent / "base"
    assert spec.data.path == str(path.parent / "demos")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: spec.yaml\n", "base = 'spec.yaml': the specs build on each other in a circle: spec.yaml -> spec.yaml"),
        ("base: [a.yaml]\n", "must be the path of another run spec"),
        ("base: nowhere.yaml\n", "nowhere.yaml: cannot read spec"),
        ("base: $NO_SUCH_VARIABLE/a.yaml\n", "NO_SUCH_VARIABLE"),
    ],
)
def test_a_base_that_is_none(write, text, message):
    assert message.split(": ")[-1] in faults(write(text))


MIXTURE = """
name: run
model: {checkpoint: base}
data:
  sources:
    - {path: "s3://bucket/libero_90/1.0.0", weight: 3}
    - {path: bridge_orig, cameras: {wrist: null}, transform: bridge}
  cameras: [primary, wrist]
  transform: libero
"""


def test_a_mixture_takes_from_data_what_a_source_does_not_say(write):
    path = write(MIXTURE)
    spec = load_spec(path, ["data.sources.1.weight=0.5"])
    first, second = spec.data.resolved()
    assert (first.path, first.name, first.weight) == ("s3://bucket/libero_90/1.0.0", "libero_90", 3)
    assert (second.path, second.name, second.weight) == (str(path.parent / "bridge_orig"), "bridge_orig", 0.5)
    assert (first.transform, second.transform) == ("libero", "bridge")
    assert load_spec(write(dump(spec))) == spec


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.sources.0.weight=0"], "data.sources.0.weight = 0: input should be greater than 0"),
        (["data.sources.1.weight=-1"], "data.sources.1.weight = -1: input should be greater than 0"),
        (["data.sources.1.path=bridge_orig", "data.sources.1.name=libero_90"], "named twice: libero_90"),
        (["data.sources.2.weight=1"], "'2' is no place in a list of 2"),
        (["data.path=here"], r"path (one data set) or sources (a mixture) must be given, found both"),
        (["data.sources.1.cameras={top: image_0}"], "source bridge_orig maps cameras that data.cameras lacks: top"),
        (["data.sources.1.wight=2"], "data.sources.1.wight = 2: unknown field; did you mean 'weight'?"),
    ],
)
def test_what_a_mixture_may_not_be(write, overrides, message):
    assert message in faults(write(MIXTURE), *overrides)


def test_dump_reads_back_unchanged(write):
    spec = load_spec(write(MINIMAL), ["data.splits.ood.tasks=['*bowl*']", "training.eps=1e-6"])
    assert load_spec(write(dump(spec))) == spec


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.e-4"])
def test_override_reads_scientific_numbers(write, text):
    assert load_spec(write(MINIMAL), [f"training.learning_rate={text}"]).training.learning_rate == 1e-4


def test_all_faults_are_reported_at_once(write):
    text = faults(
        write(MINIMAL + "proximity: {order: [dinov2, dinov2], lambda_max: -1}\n"),
        "training.precision=fp16",
        "training.learning_rte=1",
    )
    assert "proximity.order = ['dinov2', 'dinov2']: module named twice: dinov2" in text
    assert "proximity.lambda_max = -1" in text
    assert "training.precision = 'fp16': must be one of 'fp32' or 'bf16'" in text
    assert "training.learning_rte = 1: unknown field; did you mean 'learning_rate'?" in text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.max_steps=0", "training.max_steps = 0: input should be greater than or equal to 1"),
        ("training.zero_stage=4", "training.zero_stage = 4: input should be less than or equal to 3"),
        ("training.learning_rate=.nan", "training.learning_rate = nan: input should be"),
        ("training.warmup_steps=5000", "warmup_steps (5000) must be less than max_steps (1000)"),
        ("data.cameras=[]", "data.cameras = []: list should have at least 1 item"),
        ("data.cameras=[a, a]", "camera named twice: a"),
        ("data.splits.held_out.episodes=last", "data.splits.held_out.episodes = 'last'"),
        ("name=../up", "name = '../up': a name has letters"),
        ("cluster.workers=0", "cluster.workers = 0"),
        ("training.max_steps.x=1", "'max_steps' is a value, not a section"),
        ("training", "write it as section.field=value"),
    ],
)
def test_bad_value_names_field_and_value(write, override, expected):
    base = MINIMAL + "training: {max_steps: 1000}\n"
    assert expected in faults(write(base), override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.LEARNING_RATE=1", "training.LEARNING_RATE = 1: unknown field; did you mean 'learning_rate'?"),
        ("name=123", "name = 123: input should be a valid string: where it is one, put it in quotes"),
        ("data.splits.train.episodes=8:", "episodes = {8: None}: input should be a valid string: where it is one, put"),
        ("data.splits.train.episodes='-:8'", "data.splits.train.episodes = '-:8': string should match pattern"),
        ("data.splits.train.tasks=[*bowl*]", "; a text with such a character goes in quotes"),
        ("proximity.order=dinov2", "proximity.order = 'dinov2': input should be a valid list: write it as [a, b]"),
        ("training.max_steps=true", "training.max_steps = True: must be a number, not true or false"),
        ("training.weight_decay=true", "training.weight_decay = True: must be a number, not true or false"),
        ("training.seed=1e30", "training.seed = 1e+30: "),
        ("data.cache.max_gib=1e308", "data.cache.max_gib = 1e+308: input should be less than"),
        ("cluster.storage=", "cluster.storage = None: must be a folder, or an address such as s3://bucket/runs"),
        ("cluster.storage=[a]", "cluster.storage = ['a']: must be a folder, or an address such as s3://bucket/runs"),
        ("cluster.storage=''", "cluster.storage = '': is empty: give a path, or . for this folder"),
        ("cluster.storage=s3:/bucket/x", "cluster.storage = 's3:/bucket/x': an address has 2 slashes: s3://bucket/x"),
        ("cluster.storage=file://x", "cluster.storage = 'file://x': an address has 3 slashes: file:///x"),
        ("cluster.scratch=s3://bucket/x", "cluster.scratch = 's3://bucket/x': is an address, and this must lie on the"),
        ("model.checkpoint=s3://bucket/x", "model.checkpoint = 's3://bucket/x': is an address, and this must lie on"),
        ("proximity.l2_sp=high", "proximity.l2_sp = 'high': a section: its fields are strength, shape"),
        ("training.deepspeed={bf16: {enabled: true}}", "bf16 cannot be set here: set training.precision"),
    ],
)
def test_bad_value_says_how_it_is_written(write, override, message):
    assert message in faults(write(MINIMAL), override)


def test_plain_values_are_read_as_yaml_1_2_has_them(write):
    spec = load_spec(
        write(MINIMAL.replace("run", "2024-13-45") + "training:\n  <<: {seed: 0123, max_steps: 1_000}\n  eps: .5e-7\n"),
        ["data.splits.train.episodes=8:16", "tracking.experiment=no", "data.augment=on", "training.clip_norm=+1.5"],
    )
    assert (spec.name, spec.tracking.experiment, spec.data.splits.train.episodes) == ("2024-13-45", "no", "8:16")
    training = spec.training
    assert (training.seed, training.max_steps, training.eps, training.clip_norm) == (123, 1000, 5e-8, 1.5)
    assert spec.data.augment
    assert load_spec(write(dump(spec))) == spec


def test_a_section_that_a_file_leaves_out_can_be_set(write):
    spec = load_spec(write(MINIMAL.replace("checkpoint: base", "checkpoint: base, lora: null")), ["model.lora.rank=8"])
    assert spec.model.lora is not None and spec.model.lora.rank == 8
    said = faults(write(MINIMAL + "cluster: {workers: 2}\n"), "cluster.workers.min=2")
    assert "to make it one, set it whole: cluster.workers={field: value}" in said


def test_a_checkpoint_may_be_a_file_address(write):
    assert str(load_spec(write(MINIMAL), ["model.checkpoint=file:///base"]).model.checkpoint) == "/base"


def test_missing_section(write):
    assert "data = None: required, but missing" in faults(write("name: x\nmodel: {checkpoint: a}\n"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: !!python/object/apply:os.system ['touch /tmp/owned']", "never Python objects"),
        ("name: !!python/name:os.system", "never Python objects"),
        ("name: x\nname: y\n", "key 'name' stands twice (line 1"),
        ("name: [x\n", "not valid YAML"),
        ("name: " + "9" * 5000, "cannot be read: Exceeds the limit"),
        ("name: " + "[" * 3000, "cannot be read: maximum recursion depth"),
        ("name: &a [*a]\n", "an alias names what it stands in (line 1, column 7)"),
        ("- a\n- b\n", "a spec is a mapping of sections, found list"),
        ("", "found NoneType"),
    ],
)
def test_yaml_that_is_no_plain_mapping(write, text, expected):
    assert expected in faults(write(text))


def test_missing_file(tmp_path):
    assert "cannot read spec" in faults(tmp_path / "none.yaml")


def test_unknown_field_inside_an_optional_section_lists_its_fields(write):
    text = faults(write(MINIMAL), "data.splits.ood.task=['*']")
    assert "did you mean 'tasks'? allowed: tasks, exclude_tasks, episodes" in text


def test_specs_are_frozen(write):
    spec = load_spec(write(MINIMAL))
    assert isinstance(spec, RunSpec)
    with pytest.raises(ValueError, match="frozen"):
        spec.name = "other"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.deepspeed.overlap_com=true"], "overlap_com = True: unknown field; did you mean 'overlap_comm'?"),
        (["training.deepspeed.round_robin_gradients=true"], "round_robin_gradients cannot be set here: with it DeepSp"),
        (["training.deepspeed.stage=3"], "stage cannot be set here: set training.zero_stage"),
        (["training.deepspeed.offload_param.device=cpu"], "deepspeed.offload_param needs zero_stage = 3, this is 2"),
        (["training.deepspeed.offload_optimizer.device=nvme"], "must be one of 'cpu'"),
        (
            ["training.deepspeed.allgather_bucket_size=5", "training.zero_stage=3"],
            "deepspeed.allgather_bucket_size belongs to zero_stage 1 and 2",
        ),
        (
            [
                "training.deepspeed.offload_optimizer.device=cpu",
                "training.zero_stage=1",
                "training.gradient_accumulation=2",
            ],
            "DeepSpeed cannot offload at zero_stage 1",
        ),
    ],
)
def test_deepspeed_fields_that_are_unknown_refused_or_of_another_stage(overrides, message, write):
    with pytest.raises(SpecError) as caught:
        load_spec(write(MINIMAL), overrides)
    assert message in str(caught.value)
