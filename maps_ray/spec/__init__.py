"""The run spec: models, YAML with dotted overrides, and errors that name field, value and remedy."""

from maps_ray.spec.cluster_spec import ClusterSpec, TrackingSpec
from maps_ray.spec.credentials import take_credentials
from maps_ray.spec.data_spec import CacheSpec, DataSpec, SourceSpec, SplitSpec, SplitsSpec
from maps_ray.spec.evaluation_spec import EvaluationSpec, RolloutSpec
from maps_ray.spec.load import apply_overrides, dump, load_spec, parse, read_dumped, read_yaml, to_yaml
from maps_ray.spec.paths import expand
from maps_ray.spec.problems import Problem, SpecError, nearest
from maps_ray.spec.run_spec import LoraSpec, ModelSpec, ProximitySpec, RunSpec
from maps_ray.spec.training_spec import TrainingSpec

__all__ = [
    "CacheSpec",
    "ClusterSpec",
    "DataSpec",
    "EvaluationSpec",
    "LoraSpec",
    "ModelSpec",
    "Problem",
    "ProximitySpec",
    "RolloutSpec",
    "RunSpec",
    "SourceSpec",
    "SpecError",
    "SplitSpec",
    "SplitsSpec",
    "TrackingSpec",
    "TrainingSpec",
    "apply_overrides",
    "dump",
    "expand",
    "load_spec",
    "nearest",
    "parse",
    "read_dumped",
    "read_yaml",
    "take_credentials",
    "to_yaml",
]
