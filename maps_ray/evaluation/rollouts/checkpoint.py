"""What an evaluation must know of a checkpoint before anything starts: what it reads, and its fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

from maps_ray.evaluation.rollouts.plan import RolloutRequest
from maps_ray.evaluation.rollouts.protocol import Gripper
from maps_ray.models import CheckpointError, checkpoint_folder, describe
from maps_ray.models.files.formats import read_json
from maps_ray.models.units import CODEC_OPTIONS, CodecOptions, Units, units_and_images
from maps_ray.spec import Problem, SpecError, nearest

SIZE_SETTINGS = (
    "name", "num_images", "use_proprio", "chunk", "action_dim", "proprio_dim", "head", "film", "attention_mask",
    "released_faults",
)  # fmt: skip
DATA_SETTINGS = ("gripper", "cameras", "camera_size")

# The cameras and their size in the published LIBERO data.
_CAMERAS = ("image", "wrist_image", "image_3")
_CAMERA_SIZE = 256

# Weights beyond this size are sampled: a training step moves all of them.
_READ_WHOLE = 64 * 2**20
_BLOCK = 2**16
_BLOCKS = 256


@dataclass(frozen=True)
class PolicyFacts:
    """A checkpoint, and what it needs of a simulator."""

    folder: str
    fingerprint: str
    """Of its files."""
    sizes: dict[str, Any]
    """Keyword arguments of `load_policy`, beyond what the checkpoint says."""
    codec: CodecOptions
    """Keyword arguments of `Codec.read`."""
    cameras: tuple[str, ...]
    camera_size: int
    gripper: Gripper
    action_dim: int
    proprio_dim: int | None
    """None where the policy does not read it."""
    dtype: str

    def identity(self) -> dict[str, object]:
        """All of it that an episode's result depends on."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}


def read_facts(checkpoint: Path, request: RolloutRequest) -> PolicyFacts:
    """Reads configuration, statistics and headers of a checkpoint, or of a finished run; no weights.

    Raises:
        SpecError: it cannot be evaluated; all faults that can be found together.
    """
    settings = dict(request.settings)
    known = (*SIZE_SETTINGS, *CODEC_OPTIONS, *DATA_SETTINGS)
    unknown = [Problem("--set", name, f"no such setting; {nearest(name, known)}") for name in settings.keys() - known]
    if unknown:
        raise SpecError(unknown)
    sizes = {name: value for name, value in settings.items() if name in SIZE_SETTINGS}
    codec = cast(CodecOptions, {name: value for name, value in settings.items() if name in CODEC_OPTIONS})
    try:
        folder = checkpoint_folder(checkpoint).resolve()
        info = describe(folder, **sizes)
        faults = info.problems + [f"{name} has no weights in {folder}: train it first" for name in info.fresh_modules]
        if not (folder / "dataset_statistics.json").is_file():
            faults.append(f"{folder} has no dataset_statistics.json: its actions would have no units")
        if faults:
            raise CheckpointError("\n".join(faults))
        trained = read_json(folder / "config.json").get("policy") or {}
        units = Units.read(folder, units_and_images(trained, codec)[0], codec.get("dataset"))
    except (CheckpointError, TypeError) as error:
        raise SpecError([Problem("CHECKPOINT", str(checkpoint), str(error))]) from None
    said = {**trained, **settings}
    proprio = units.proprio.low.size if units.proprio is not None else None
    cameras = _cameras(said)
    problems = _problems(said, cameras)
    if said.get("use_proprio") and proprio is None:
        problems.append(Problem("CHECKPOINT", str(checkpoint), "it reads proprio, its statistics have none"))
    if problems:
        raise SpecError(problems)
    dtype = request.dtype
    if dtype == "as trained":
        dtype = "bfloat16" if info.dtype in ("bfloat16", "float16") else "float32"
    return PolicyFacts(
        folder=str(folder),
        fingerprint=fingerprint(folder),
        sizes=sizes,
        codec=codec,
        cameras=cameras,
        camera_size=int(said.get("camera_size", _CAMERA_SIZE)),
        gripper=said.get("gripper", "libero"),
        action_dim=units.action.low.size,
        proprio_dim=proprio if said.get("use_proprio") else None,
        dtype=dtype,
    )


def fingerprint(folder: Path) -> str:
    """SHA-256 over a checkpoint's files: names, sizes and contents; of large files, of blocks spread over them."""
    digest = hashlib.sha256()
    for path in sorted([*folder.iterdir(), *folder.glob("checkpoints/*.pt")]):
        if path.suffix not in (".json", ".safetensors", ".pt", ".model"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}|{size}|".encode())
        with path.open("rb") as file:
            if size <= _READ_WHOLE:
                digest.update(file.read())
                continue
            for block in range(_BLOCKS):
                file.seek(block * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _cameras(said: Mapping[str, Any]) -> tuple[str, ...]:
    given = said.get("cameras")
    if isinstance(given, str):
        return tuple(given.split(","))
    return tuple(given) if given else _CAMERAS[: said.get("num_images", 1)]


def _problems(said: Mapping[str, Any], cameras: tuple[str, ...]) -> list[Problem]:
    problems = []
    if said.get("gripper", "libero") not in get_args(Gripper):
        problems.append(Problem("gripper", said["gripper"], f"must be one of {', '.join(get_args(Gripper))}"))
    if len(cameras) != said.get("num_images", 1):
        message = f"the policy reads {said.get('num_images', 1)} image(s): name as many cameras, primary first"
        problems.append(Problem("cameras", list(cameras), message))
    size = said.get("camera_size", _CAMERA_SIZE)
    if not isinstance(size, int) or size < 8:
        problems.append(Problem("camera_size", size, "must be the side of the images in pixels"))
    return problems
