"""Sections of a run spec on data: sources, splits and the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from maps_ray.spec.section import (
    Count,
    EpisodeSlice,
    Location,
    NonNegative,
    Positive,
    Section,
    each_once,
    source_name,
)


class SplitSpec(Section):
    """Episodes of a data set: those whose task matches, then a slice of each such task's episodes."""

    tasks: Annotated[list[str], Field(min_length=1)] = ["*"]
    """Shell-style patterns; an episode belongs when its sentence matches one of them, ignoring case."""
    exclude_tasks: list[str] = []
    """Patterns that take a task out again."""
    episodes: EpisodeSlice = ":"
    """Python slice over each matching task's episodes in data set order: `:8`, `-2:`, `:`."""
    stored: str = "train"
    """Split of the data set as it is stored: RLDS sets may have `val` beside `train`."""


class SplitsSpec(Section):
    """The three splits. An episode may stand in one of them only."""

    train: SplitSpec = SplitSpec()
    """What is trained on."""
    held_out: SplitSpec | None = None
    """Same tasks as `train`, other episodes: in distribution."""
    ood: SplitSpec | None = None
    """Tasks that `train` never shows: out of distribution."""


class SourceSpec(Section):
    """One data set of a mixture."""

    path: Location
    """Folder, file or URI: LeRobotDataset v2.0 to v3, RLDS, LIBERO HDF5; `s3://`, `gs://`, `file://`,
    `hf://datasets/NAME@REVISION`."""
    name: Annotated[str, Field(min_length=1)] | None = None
    """Key of its statistics in the checkpoint; none takes the last part of the path that is no version."""
    weight: Positive = 1.0
    """Its share of the samples drawn, see `data.balance`."""
    cameras: dict[str, str | None] = {}
    """Camera of `data.cameras` -> camera as this data set stores it; none is a view that it lacks: black."""
    action: str | None = None
    """Feature with the actions; none takes `data.action`."""
    state: str | None = None
    """Feature with the proprioception; none takes `data.state`."""
    transform: str | None = None
    """What makes trained vectors of the stored ones; none takes `data.transform`."""
    splits: SplitsSpec | None = None
    """Which of its episodes train, and which are kept; none takes `data.splits`."""

    @property
    def key(self) -> str:
        """`name`, or what the path is called."""
        return self.name or source_name(self.path)


class CacheSpec(Section):
    """What a node keeps on its disk of the data: the index of each data set, and videos fetched from object stores."""

    folder: Path | None = None
    """Shared by the workers of a node, or by all nodes; none takes `$MAPS_RAY_CACHE`, or `~/.cache/maps_ray`."""
    max_gib: Annotated[NonNegative, Field(le=2**30)] = 0
    """Room for whole videos of object stores; those used longest ago make place. 0: read by ranges, keep nothing."""


class DataSpec(Section):
    """Demonstrations and how they become batches."""

    path: Location | None = None
    """The data set, where there is one alone: as `data.sources.path`."""
    sources: Annotated[list[SourceSpec], Field(min_length=1)] | None = None
    """The data sets of a mixture, in place of `path`."""
    balance: bool = True
    """Multiply the weights of sources by their numbers of steps, as OpenVLA trains: a weight of 1 each then shows
    every step equally often. Off: the weights themselves are the shares."""
    cameras: Annotated[list[str], Field(min_length=1, max_length=3)] = ["image", "wrist_image"]
    """Cameras as stored, or `primary` and `wrist`; primary first. Their number is the number of images per sample."""
    action: str | None = None
    """Feature with the actions; none finds the usual names."""
    state: str | None = None
    """Feature with the proprioception; none finds the usual names."""
    transform: str | None = None
    """`libero`, `bridge`, `calvin`, `aloha` as the published configurations, or your own as `module:function`; none
    takes the vectors as stored, but for `gripper`."""
    chunk: Count = 8
    """Actions predicted at once."""
    augment: bool = False
    """Change training images at random as OpenVLA does: crop of 90 %, brightness, contrast, saturation, hue."""
    normalization: Literal["q01_q99", "min_max"] = "q01_q99"
    """Range of actions and proprio that becomes -1 .. 1, of each source by its own statistics."""
    gripper: Literal["libero", "none"] = "libero"
    """`libero`: the last action dimension, -1 open .. 1 closed in the data, becomes 1 open .. 0 closed and is not
    normalised. `none`: every dimension is normalised alike. A source with a transform follows the transform."""
    splits: SplitsSpec = SplitsSpec()
    """Which episodes train, and which are kept for evaluation."""
    cache: CacheSpec = CacheSpec()
    """What is kept on disk."""

    @field_validator("cameras")
    @classmethod
    def _cameras_once(cls, cameras: list[str]) -> list[str]:
        return each_once(cameras, "camera")

    @field_validator("sources")
    @classmethod
    def _sources_once(cls, sources: list[SourceSpec] | None) -> list[SourceSpec] | None:
        if sources:
            each_once([source.key for source in sources], "source (its `name` tells two of the same path apart)")
        return sources

    @model_validator(mode="after")
    def _path_or_sources(self) -> DataSpec:
        if (self.path is None) == (self.sources is None):
            given = "neither" if self.path is None else "both"
            raise ValueError(f"path (one data set) or sources (a mixture) must be given, found {given}")
        for source in self.sources or ():
            unknown = sorted(set(source.cameras) - set(self.cameras))
            if unknown:
                raise ValueError(
                    f"source {source.key} maps cameras that data.cameras lacks: {', '.join(unknown)}; "
                    f"data.cameras are {', '.join(self.cameras)}"
                )
        return self

    def absolute(self) -> DataSpec:
        """With paths that mean the same from any working directory."""

        def absolute(location: str) -> str:
            return location if "://" in location else str(Path(location).resolve())

        sources = self.sources and [s.model_copy(update={"path": absolute(s.path)}) for s in self.sources]
        cache = self.cache
        if cache.folder is not None:
            cache = cache.model_copy(update={"folder": cache.folder.resolve()})
        return self.model_copy(update={"path": self.path and absolute(self.path), "sources": sources, "cache": cache})

    def resolved(self) -> list[SourceSpec]:
        """The sources with everything said that they take from here; the one of `path` where there is no mixture."""
        sources = self.sources or [SourceSpec.model_validate({"path": self.path})]
        return [
            source.model_copy(
                update={
                    "name": source.key,
                    "action": source.action or self.action,
                    "state": source.state or self.state,
                    "transform": source.transform or self.transform,
                    "splits": source.splits or self.splits,
                }
            )
            for source in sources
        ]

    def field(self, number: int) -> str:
        """Where the spec names source `number`, for messages: `data`, or `data.sources.0`."""
        return "data" if self.sources is None else f"data.sources.{number}"
