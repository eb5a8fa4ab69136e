"""How fast demonstrations become batches: for each format, against LeRobot's own reader, with time, memory and disk.

    python benchmarks/data.py                      # what runs here
    python benchmarks/data.py --lerobot PYTHON     # and LeRobot's reader, in an environment of its own
    python benchmarks/data.py --tensorflow PYTHON  # and TensorFlow's on the same RLDS, likewise

The same moving squares are written in each format: two cameras of 256 pixels. A sample is two frames read at random,
resized to 224 by Lanczos-3 and augmented, and 8 actions; `read` is the reading alone. Speed is samples per second of
CPU time, which a busy machine changes little: what one core gives when nothing else wants it. PYTHON is an interpreter
that has `lerobot` (0.3 reads the same v2.1 files, later ones the v3), or `tensorflow`. Rounds of all contestants
alternate; the medians are printed as JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SIZE, FPS, CHUNK = 256, 20, 8
ROUND_SAMPLES = 64
_TASKS = ("pick up the bowl", "open the drawer", "close the drawer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=12, help="of the data sets whose speed is measured")
    parser.add_argument("--many", type=int, default=2000, help="episodes of the one whose start is measured")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lerobot", help="an interpreter with lerobot")
    parser.add_argument("--tensorflow", help="an interpreter with tensorflow")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="data-") as name:
        folder = Path(name)
        os.environ["MAPS_RAY_CACHE"] = str(folder / "cache")
        made = {kind: write(folder / kind, options.episodes) for kind, write in WRITERS.items()}
        result: dict[str, Any] = {"load": [round(value, 1) for value in os.getloadavg()]}
        result["samples_per_second_and_core"] = speeds(made, options)
        result["start"] = start_of(folder, options.many)
        result["cache"] = cache_use(folder)
        print(json.dumps(result, indent=1))


# What is measured.


def speeds(made: dict[str, Path], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Medians over alternating rounds."""
    contestants: dict[str, Ours | Other] = {kind: Ours(path) for kind, path in made.items()}
    if options.lerobot:
        contestants["lerobot"] = Other(options.lerobot, LEROBOT, made["lerobot_v2.1"], made["lerobot_v3"])
    if options.tensorflow:
        contestants["tensorflow"] = Other(options.tensorflow, TENSORFLOW, made["rlds"])
    parts = ("whole", "read")
    rates: dict[str, dict[str, list[float]]] = {name: {part: [] for part in parts} for name in contestants}
    for number in range(options.rounds + 1):
        for name, contestant in contestants.items():
            for part in parts:
                rate = contestant.round(part)
                # The first round opens files and warms caches.
                if number:
                    rates[name][part].append(rate)
    for contestant in contestants.values():
        contestant.close()
    return {
        name: {part: round(statistics.median(values), 1) for part, values in found.items()}
        for name, found in rates.items()
    }


class Ours:
    """One format, read by this package."""

    def __init__(self, path: Path) -> None:
        from maps_ray.data import Demonstrations
        from maps_ray.spec import DataSpec

        spec = DataSpec(path=path, cameras=["primary", "wrist"], chunk=CHUNK, gripper="none")
        self._samples = Demonstrations(spec, use_proprio=True).samples("train")
        self._random = np.random.default_rng(0)

    def round(self, part: str) -> float:
        began = time.process_time()
        for index in self._random.integers(0, len(self._samples), ROUND_SAMPLES):
            images = self._samples[int(index)].images
            if part == "whole":
                for image in images:
                    prepared(image, self._random)
        return ROUND_SAMPLES / (time.process_time() - began)

    def close(self) -> None:
        """Nothing is left open that the process does not close."""


def prepared(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Resized and augmented, as training has it; the same for every reader."""
    from maps_ray.data.augment import augment
    from maps_ray.models.resampling import lanczos3

    return augment(lanczos3(image, (224, 224)), random)


class Other:
    """Another reader in an interpreter of its own: a process that does a round for each line it is sent."""

    def __init__(self, python: str, program: str, *paths: Path) -> None:
        self._process = subprocess.Popen(
            [python, "-c", program, str(ROUND_SAMPLES), *map(str, paths)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # A PYTHONPATH of ours would put our packages before those of that interpreter.
            env=os.environ | {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"},
        )

    def round(self, part: str) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(part, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


LEROBOT = """
import sys, time
import numpy as np, torch
torch.set_num_threads(1)
from lerobot.datasets.lerobot_dataset import CODEBASE_VERSION, LeRobotDataset
from torchvision.transforms import v2
count, older, newer = int(sys.argv[1]), *sys.argv[2:]
root = older if CODEBASE_VERSION == "v2.1" else newer
data = LeRobotDataset("local/bench", root=root, delta_timestamps={"action": [i / 20 for i in range(8)]})
change = v2.Compose([v2.Resize((224, 224), antialias=True), v2.RandomResizedCrop(224, (0.9, 0.9)),
                     v2.ColorJitter(0.2, 0.2, 0.2, 0.05)])
random = np.random.default_rng(0)
for line in sys.stdin:
    began = time.process_time()
    for index in random.integers(0, len(data), count):
        row = data[int(index)]
        if line.strip() == "whole":
            for camera in data.meta.camera_keys:
                change(row[camera])
    print(count / (time.process_time() - began), flush=True)
"""

# The published pipeline's own operations on whole episodes in file order: parse, decode, resize by Lanczos-3, augment.
TENSORFLOW = """
import glob, sys, time
import tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(1); tf.config.threading.set_inter_op_parallelism_threads(1)
cameras = ("steps/observation/image", "steps/observation/wrist_image")
spec = {name: tf.io.VarLenFeature(tf.string) for name in cameras} | {"steps/action": tf.io.VarLenFeature(tf.float32)}
def steps(record):
    found = tf.io.parse_single_example(record, spec)
    return tf.data.Dataset.from_tensor_slices(tuple(tf.sparse.to_dense(found[name]) for name in cameras))
def decoded(*images):
    return tuple(tf.io.decode_image(data, expand_animations=False, dtype=tf.uint8) for data in images)
def change(*images):
    result = []
    for image in decoded(*images):
        image = tf.image.resize(image, (224, 224), method="lanczos3", antialias=True)
        image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
        image = tf.image.convert_image_dtype(image, tf.float32)
        box = tf.random.uniform([2], 0, 1 - 0.9 ** 0.5)
        boxes = tf.stack([box[0], box[1], box[0] + 0.9 ** 0.5, box[1] + 0.9 ** 0.5])[None]
        image = tf.image.crop_and_resize(image[None], boxes, [0], (224, 224))[0]
        image = tf.image.random_brightness(image, 0.2)
        image = tf.image.random_contrast(image, 0.8, 1.2)
        image = tf.image.random_saturation(image, 0.8, 1.2)
        image = tf.image.random_hue(image, 0.05)
        result.append(tf.cast(tf.clip_by_value(image, 0, 1) * 255, tf.uint8))
    return tuple(result)
count = int(sys.argv[1])
files = sorted(glob.glob(sys.argv[2] + "/*.tfrecord-*"))
records = tf.data.TFRecordDataset(files).repeat().flat_map(steps).shuffle(256)
data = {"whole": iter(records.map(change)), "read": iter(records.map(decoded))}
for line in sys.stdin:
    began = time.process_time()
    for _ in range(count):
        next(data[line.strip()])
    print(count / (time.process_time() - began), flush=True)
"""


def start_of(folder: Path, episodes: int) -> dict[str, Any]:
    """Seconds of a new process from nothing to its first batch, without and with the index; memory of a loader."""
    found: dict[str, Any] = {"episodes": episodes}
    for name, length in (("short", 20), ("long", 60)):
        path = write_lerobot_v2(folder / f"many_{name}", episodes, length=length)
        for when in ("first_run", "second_run", "third_run"):
            done = subprocess.run([sys.executable, __file__, "--begin", str(path)], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            found[f"{name}_{when}"] = json.loads(done.stdout) | {"frames": episodes * length}
    return found


def begin(path: str) -> None:
    """A first batch of 16 and the memory of making 20 more. CPU time is that of the process from its start."""
    began = time.perf_counter()
    from maps_ray.data import Batches, Demonstrations
    from maps_ray.spec import DataSpec

    spec = DataSpec(path=path, cameras=["primary", "wrist"], chunk=CHUNK, gripper="none")
    train = Demonstrations(spec, use_proprio=True).samples("train")
    batches = Batches(train, Stack(), seed=0, global_batch_size=16, augment=True)
    batches.batch(0)
    seconds, cpu = time.perf_counter() - began, time.process_time()
    for step in range(1, 20):
        batches.batch(step)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        json.dumps(
            {"seconds_to_first_batch": round(seconds, 2), "cpu_seconds": round(cpu, 2), "peak_gib": round(peak, 3)}
        )
    )


class Stack:
    """A processor that keeps what it is given."""

    def encode(self, instruction: str, images: Any, proprio: Any, actions: Any) -> Any:
        return np.stack(images), proprio, actions

    def collate(self, samples: Any) -> Any:
        return [np.stack(part) for part in zip(*samples, strict=True)]


def cache_use(folder: Path) -> dict[str, float]:
    """Most that the cache takes on disk while more is fetched than it has room for."""
    from maps_ray.data.cache import FileCache

    room, size, store = 2**30, 96 * 2**20, folder / "store"
    store.mkdir()
    for number in range(16):
        with (store / f"{number}.mp4").open("wb") as file:
            file.truncate(size)
    cache, most = FileCache(folder / "bounded", room), 0.0
    for number in range(16):
        cache(f"local://{store}/{number}.mp4")
        used = subprocess.run(["du", "-sB1", folder / "bounded"], capture_output=True, text=True, check=True)
        most = max(most, int(used.stdout.split()[0]) / 2**30)
    return {"max_gib": 1, "fetched_gib": round(16 * size / 2**30, 2), "most_gib_on_disk": round(most, 3)}


# The same episodes in each format.


def episodes_of(count: int, length: int = 60) -> Iterator[tuple[str, list[np.ndarray], np.ndarray, np.ndarray]]:
    """(task, frames of each camera, states, actions)."""
    random = np.random.default_rng(0)
    ground = random.integers(0, 256, (SIZE // 16, SIZE // 16, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    for number in range(count):
        cameras = []
        for camera in range(2):
            frames = np.repeat(np.roll(ground, 16 * camera, 1)[None], length, 0).copy()
            for step, frame in enumerate(frames):
                left = (3 * step + 7 * number) % (SIZE - 48)
                frame[80:128, left : left + 48] = (200, 40 + 20 * camera, 60)
            cameras.append(frames)
        state, action = random.normal(size=(length, 8)), random.normal(size=(length, 7))
        yield _TASKS[number % 3], cameras, state.astype(np.float32), action.astype(np.float32)


def write_lerobot_v3(root: Path, count: int) -> Path:
    from maps_ray.data import LeRobotWriter

    cameras = {name: (SIZE, SIZE) for name in ("image", "wrist_image")}
    names = [f"d{i}" for i in range(8)]
    # Key frames as far apart as LeRobot's own writer has them (`encode_video_frames`, g=2).
    with LeRobotWriter(root, cameras=cameras, state_names=names, action_names=names[:7], gop=2) as writer:
        for task, frames, state, action in episodes_of(count):
            writer.add_episode(task, dict(zip(cameras, frames, strict=True)), state, action)
    return root


def write_lerobot_v2(root: Path, count: int, *, png: bool = False, length: int = 60) -> Path:
    """v2.1; many episodes share their content, which the index does not know."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from maps_ray.data.video import VideoEncoder

    keys = ["observation.images.image", "observation.images.wrist_image"]
    distinct = list(episodes_of(min(count, 12), length))
    lines, stats = [], []
    # LeRobot's reader asks for them; nobody reads the values here.
    pixels = np.random.default_rng(0).random((4, 3, 1, 1))
    for number in range(count):
        task, frames, state, action = distinct[number % len(distinct)]
        columns: dict[str, Any] = {
            "observation.state": pa.array(list(state)),
            "action": pa.array(list(action)),
            "timestamp": (np.arange(length) / FPS).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, number),
            "index": np.arange(length) + number * length,
            "task_index": np.full(length, number % 3),
        }
        for key, images in zip(keys, frames, strict=True):
            if png:
                columns[key] = pa.array([{"bytes": _encoded(Image, image, "PNG"), "path": None} for image in images])
                continue
            path = root / f"videos/chunk-000/{key}/episode_{number:06d}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            if number >= len(distinct):
                os.link(root / f"videos/chunk-000/{key}/episode_{number % len(distinct):06d}.mp4", path)
                continue
            encoder = VideoEncoder(path, (SIZE, SIZE), FPS, gop=2)
            encoder.write(images)
            encoder.close()
        path = root / f"data/chunk-000/episode_{number:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
        lines.append({"episode_index": number, "tasks": [task], "length": length})
        vectors = {name: _spread(np.stack(columns[name].to_pylist())) for name in ("observation.state", "action")}
        stats.append({"episode_index": number, "stats": vectors | dict.fromkeys(keys, _spread(pixels))})
    shape = {"dtype": "image" if png else "video", "shape": [SIZE, SIZE, 3], "names": ["height", "width", "channels"]}
    features: dict[str, Any] = {key: shape for key in keys}
    features |= {
        "observation.state": {"dtype": "float32", "shape": [8], "names": None},
        "action": {"dtype": "float32", "shape": [7], "names": None},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    }
    index = ("frame_index", "episode_index", "index", "task_index")
    features |= {name: {"dtype": "int64", "shape": [1], "names": None} for name in index}
    info = {
        "codebase_version": "v2.1",
        "fps": FPS,
        "total_episodes": count,
        "total_frames": count * length,
        "chunks_size": 100_000,
        "total_tasks": 3,
        "total_chunks": 1,
        "robot_type": None,
        "features": features,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": None if png else "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    meta = root / "meta"
    meta.mkdir(parents=True)
    (meta / "info.json").write_text(json.dumps(info))
    (meta / "tasks.jsonl").write_text(
        "".join(json.dumps({"task_index": i, "task": t}) + "\n" for i, t in enumerate(_TASKS))
    )
    for name, content in (("episodes", lines), ("episodes_stats", stats)):
        (meta / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    return root


def _spread(values: np.ndarray) -> dict[str, Any]:
    bounds = {name: getattr(values, name)(axis=0).tolist() for name in ("min", "max", "mean", "std")}
    return bounds | {"count": [len(values)]}


def write_rlds(root: Path, count: int) -> Path:
    from google_crc32c import value as crc32c
    from PIL import Image

    root.mkdir()
    records = []
    for task, frames, state, action in episodes_of(count):
        values: dict[str, Any] = {
            "steps/observation/image": [_encoded(Image, image, "JPEG") for image in frames[0]],
            "steps/observation/wrist_image": [_encoded(Image, image, "JPEG") for image in frames[1]],
            "steps/observation/state": state,
            "steps/action": action,
            "steps/language_instruction": [task.encode()] * len(action),
            "steps/is_first": np.arange(len(action)) == 0,
        }
        records.append(_example(values))
    shard = root / f"squares-train.tfrecord-00000-of-{1:05d}"

    def masked(data: bytes) -> bytes:
        # TFRecord's masked CRC (tensorflow/core/lib/hash/crc32c.h).
        check = crc32c(data)
        return (((check >> 15 | check << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")

    with shard.open("wb") as file:
        for record in records:
            head = len(record).to_bytes(8, "little")
            file.write(head + masked(head) + record + masked(record))
    image = {
        "image": {"shape": {"dimensions": [str(SIZE), str(SIZE), "3"]}, "dtype": "uint8", "encodingFormat": "jpeg"}
    }

    def vector(width: int) -> dict[str, Any]:
        return {"tensor": {"shape": {"dimensions": [str(width)]}, "dtype": "float32", "encoding": "none"}}

    def dictionary(**features: Any) -> dict[str, Any]:
        return {"featuresDict": {"features": features}}

    observation = dictionary(image=image, wrist_image=image, state=vector(8))
    scalar = {"tensor": {"shape": {}, "dtype": "bool", "encoding": "none"}}
    steps = dictionary(observation=observation, action=vector(7), language_instruction={"text": {}}, is_first=scalar)
    (root / "features.json").write_text(json.dumps(dictionary(steps={"sequence": {"feature": steps}})))
    split = {
        "name": "train",
        "shardLengths": [str(count)],
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    info = {"name": "squares", "version": "1.0.0", "fileFormat": "tfrecord", "splits": [split]}
    (root / "dataset_info.json").write_text(json.dumps(info))
    return root


def _example(values: dict[str, Any]) -> bytes:
    """A tf.train.Example, by the wire format of protobuf."""

    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2]) + _varint(len(data)) + data

    entries = b""
    for name, value in values.items():
        if isinstance(value, list):
            kind = field(1, b"".join(field(1, item) for item in value))
        elif value.dtype == bool:
            kind = field(3, field(1, b"".join(_varint(int(item)) for item in value)))
        else:
            kind = field(2, field(1, value.astype("<f4").tobytes()))
        entries += field(1, field(1, name.encode()) + field(2, kind))
    return field(1, entries)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value >= 128:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def write_hdf5(root: Path, count: int) -> Path:
    import h5py

    root.mkdir()
    files = {task: h5py.File(root / f"{task.replace(' ', '_')}_demo.hdf5", "w") for task in _TASKS}
    numbers = dict.fromkeys(_TASKS, 0)
    for task, frames, state, action in episodes_of(count):
        demo = files[task].create_group(f"data/demo_{numbers[task]}")
        numbers[task] += 1
        demo["actions"], demo["rewards"], demo["dones"] = action, np.zeros(len(action)), np.zeros(len(action), np.uint8)
        # LIBERO stores both views turned by half a circle, and its reader turns them back.
        demo["obs/agentview_rgb"], demo["obs/eye_in_hand_rgb"] = (images[:, ::-1, ::-1] for images in frames)
        demo["obs/ee_states"], demo["obs/gripper_states"] = state[:, :6], state[:, 6:]
    for file in files.values():
        file.close()
    return root


def _encoded(image_module: Any, image: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    image_module.fromarray(image).save(buffer, kind, quality=95)
    return buffer.getvalue()


WRITERS: dict[str, Callable[[Path, int], Path]] = {
    "lerobot_v3": write_lerobot_v3,
    "lerobot_v2.1": write_lerobot_v2,
    "lerobot_v2.1_png": lambda root, count: write_lerobot_v2(root, count, png=True),
    "rlds": write_rlds,
    "libero_hdf5": write_hdf5,
}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--begin"]:
        begin(sys.argv[2])
    else:
        main()
