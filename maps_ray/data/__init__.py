"""Demonstrations -> normalised, tokenised batches."""

from maps_ray.data.batches import Batches, EvaluationBatch, Processor, evaluation_batches
from maps_ray.data.demonstrations import Demonstrations, check_data
from maps_ray.data.errors import DatasetError
from maps_ray.data.formats import Dataset, Episode, open_dataset
from maps_ray.data.prefetch import Prefetch
from maps_ray.data.samples import Sample, Samples
from maps_ray.data.statistics import DatasetStatistics
from maps_ray.data.writer import LeRobotWriter

__all__ = [
    "Batches",
    "Dataset",
    "DatasetError",
    "DatasetStatistics",
    "Demonstrations",
    "Episode",
    "EvaluationBatch",
    "LeRobotWriter",
    "Prefetch",
    "Processor",
    "Sample",
    "Samples",
    "check_data",
    "evaluation_batches",
    "open_dataset",
]
