"""From `data` of a run spec to the samples of each split."""

from __future__ import annotations

from collections.abc import Mapping

from maps_ray.data.dataset_error import DatasetError
from maps_ray.data.formats import KINDS, Dataset
from maps_ray.data.index import Report
from maps_ray.data.mixture import shares
from maps_ray.data.samples import Mixture
from maps_ray.data.sources import open_source
from maps_ray.data.statistics import DatasetStatistics
from maps_ray.spec import DataSpec

_SIMULATED = {"primary": "image", "wrist": "wrist_image"}


def simulated_camera(name: str) -> str:
    """What simulators call a camera of the spec."""
    return _SIMULATED.get(name, name)


class Demonstrations:
    """The data of one run: opened, indexed, split, each source with statistics of its own.

    Args:
        spec: `data` of the run spec.
        use_proprio: whether the policy sees the proprioception.
        statistics: source -> those to normalise by, for instance of a checkpoint; each source's own by default.
        report: told of progress where the index is computed.

    Raises:
        SpecError: a split is empty, or two overlap.
        DatasetError: the data cannot be read, hold NaN, or sources differ in width.
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        use_proprio: bool,
        statistics: Mapping[str, DatasetStatistics] | None = None,
        report: Report | None = None,
    ) -> None:
        self.spec = spec
        self.sources = [open_source(spec, number, report) for number in range(len(spec.resolved()))]
        for source in self.sources:
            fault = source.fault(use_proprio)
            if fault:
                raise DatasetError(fault)
        widths = {source.name: self._widths(source.dataset, use_proprio) for source in self.sources}
        if len(set(widths.values())) > 1:
            told = "; ".join(f"{name} has {' and '.join(map(str, each))}" for name, each in widths.items())
            raise DatasetError(f"data.sources differ in dimensions of actions and proprioception: {told}")
        self.statistics = dict(statistics or {s.name: s.statistics(use_proprio) for s in self.sources})
        """Source -> statistics that its vectors are normalised by."""

    @property
    def action_dim(self) -> int:
        """Dimensions of an action."""
        return self.sources[0].dataset.width("action")

    @property
    def proprio_dim(self) -> int:
        """Dimensions of the proprioception."""
        return self.sources[0].dataset.width("state")

    @property
    def gripper(self) -> str:
        """The convention of the actions that a policy of these data gives."""
        first = self.sources[0]
        made = first.dataset.transform
        return first.gripper if made is None else "libero" if made.name == "libero" else "none"

    @property
    def camera_size(self) -> int:
        """Side of the primary camera's images, in pixels."""
        return int(self.samples("train")[0].images[0].shape[1])

    @property
    def splits(self) -> list[str]:
        """Splits that any source has: `train` first."""
        return list(dict.fromkeys(split for source in self.sources for split in source.splits))

    @property
    def shares(self) -> list[float]:
        """Probability that a training sample comes from each source."""
        weights, steps = zip(*((source.weight, source.steps()) for source in self.sources), strict=True)
        return [float(share) for share in shares(weights, steps, self.spec.balance)]

    def samples(self, split: str) -> Mixture:
        """The samples of a split, of all sources that have it; frames are read when asked for."""
        having = [
            (source, share) for source, share in zip(self.sources, self.shares, strict=True) if split in source.splits
        ]
        total = sum(share for _, share in having)
        return Mixture(
            {source.name: source.samples(split, self.statistics[source.name]) for source, _ in having},
            [share / total for _, share in having],
        )

    @staticmethod
    def _widths(dataset: Dataset, use_proprio: bool) -> tuple[int, ...]:
        return tuple(dataset.width(kind) for kind in KINDS[: 1 + use_proprio])
