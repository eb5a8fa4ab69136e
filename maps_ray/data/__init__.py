"""Demonstrations -> normalised, tokenised batches."""

from maps_ray.data.batches import Batches, EvaluationBatches, Processor
from maps_ray.data.checks import check_data, data_sizes
from maps_ray.data.dataset_error import DatasetError
from maps_ray.data.demonstrations import Demonstrations
from maps_ray.data.formats import Dataset, Episode, open_dataset
from maps_ray.data.loader import Loader, loader_processes
from maps_ray.data.samples import Mixture, Sample, Samples
from maps_ray.data.statistics import DatasetStatistics
from maps_ray.data.writer import LeRobotWriter

__all__ = [
    "Batches",
    "Dataset",
    "DatasetError",
    "DatasetStatistics",
    "Demonstrations",
    "Episode",
    "EvaluationBatches",
    "LeRobotWriter",
    "Loader",
    "Mixture",
    "Processor",
    "Sample",
    "Samples",
    "check_data",
    "data_sizes",
    "loader_processes",
    "open_dataset",
]
