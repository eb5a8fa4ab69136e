"""One reader for each format of demonstrations, behind one interface; the files tell which it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from maps_ray.data import layout as v3
from maps_ray.data.dataset_error import DatasetError
from maps_ray.data.formats.base import KINDS, Dataset, Episode, Kind, Names, Scan, scan_in_threads
from maps_ray.data.formats.lerobot_info import read_info
from maps_ray.data.formats.lerobot_v2 import LeRobotV2
from maps_ray.data.formats.lerobot_v3 import LeRobotV3
from maps_ray.data.formats.libero_hdf5 import SUFFIXES, LiberoHdf5, hdf5_files
from maps_ray.data.formats.rlds import Rlds, find_version
from maps_ray.data.storage import Fetch, Storage
from maps_ray.data.transforms import Transform, resolve

__all__ = ["KINDS", "Dataset", "Episode", "Kind", "open_dataset"]


def open_dataset(
    path_or_uri: str | Path,
    split: str = "train",
    transform: str | Transform | None = None,
    *,
    action: str | None = None,
    state: str | None = None,
    cameras: Mapping[str, str] | None = None,
    fetch: Fetch | None = None,
    scan: Scan = scan_in_threads,
) -> Dataset:
    """Opens a data set of any format that is known.

    Args:
        path_or_uri: folder (or HDF5 file), or `file://`, `s3://`, `gs://`.
        split: for instance `train` or `val`.
        transform: `libero`, `bridge`, `calvin`, `aloha`, or `module:function`; vectors are as stored without one.
        action: feature that holds the actions, where it has no usual name.
        state: the same for the proprioception.
        cameras: name to ask by -> camera as stored.
        fetch: gives a local copy of a file of an object store; videos are read by ranges without it.
        scan: looks through the shards, see `Scan`.

    Raises:
        DatasetError: no data set that is known, or one that is broken; names file, field and remedy.
    """
    chosen = resolve(transform)
    names = Names(action, state, dict(cameras or {}))
    storage = Storage(path_or_uri, fetch)
    dataset = _reader(storage, split, chosen, names)
    return dataset.open(scan)


def _reader(storage: Storage, split: str, transform: Transform | None, names: Names) -> Dataset:
    if not storage.exists():
        raise DatasetError(
            f"{storage.root}: no such data set folder; give a path, an address such as s3://BUCKET/FOLDER, or "
            "hf://datasets/OWNER/NAME for one on the Hub"
        )
    if storage.root.endswith(SUFFIXES):
        folder, _, name = storage.root.rpartition("/")
        return LiberoHdf5(Storage(folder or ".", storage.fetch), [name], split, transform, names)
    if storage.is_file(v3.INFO):
        info = read_info(storage)
        version = info.codebase_version
        if re.match(r"v?3\.", version):
            return LeRobotV3(storage, info, split, transform, names)
        if re.match(r"v?2\.[01]", version):
            return LeRobotV2(storage, info, split, transform, names)
        raise DatasetError(
            f"{storage.at(v3.INFO)}: codebase_version is {version!r}, known are v2.0, v2.1 and v3; convert it with "
            "LeRobot's scripts"
        )
    version_folder = find_version(storage)
    if version_folder is not None:
        return Rlds(version_folder, split, transform, names)
    files = hdf5_files(storage)
    if files:
        return LiberoHdf5(storage, files, split, transform, names)
    raise DatasetError(
        f"{storage.root}: no data set that is known: a LeRobotDataset has {v3.INFO}, RLDS has dataset_info.json, "
        "LIBERO has *.hdf5; the path is wrong, or writing was interrupted"
    )
