"""Weights of a policy out of a checkpoint folder and into one, which is never half there."""

from __future__ import annotations

import math
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Required, TypedDict, Unpack

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from maps_ray.files import write_json
from maps_ray.models.checkpoint_faults import CheckpointError, Shape, refuse_shape_faults, shape_faults
from maps_ray.models.files.folders import ModuleFile, check_module, find_module, published_config, strip_module
from maps_ray.models.files.formats import MappedTensors, read_header
from maps_ray.models.layers import Shapes


class BaseTensors(Protocol):
    """Tensors of a checkpoint under its own keys, read on demand."""

    def __contains__(self, key: str) -> bool: ...
    def read(self, key: str) -> Tensor: ...
    def give_back(self) -> None: ...


def read_pt(path: Path, *, mapped: bool = False) -> Any:
    """The contents of a `.pt` file: tensors and plain containers, never pickled code.

    Args:
        path: the file.
        mapped: leave the tensors in the memory-mapped file until they are used.

    Raises:
        CheckpointError: unreadable, or holding anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        # torch goes on for a page, and advises `weights_only=False`.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"cannot read {path}: {reason} (only tensors are read from a .pt file, never pickled code)"
        ) from None


def read_module(file: ModuleFile, expected: Mapping[str, Shape]) -> dict[str, Tensor]:
    """The tensors of a module's file without the prefix `module.`; nothing shares memory with the file.

    Raises:
        CheckpointError: unreadable, or not exactly the tensors expected.
    """
    if file.is_safetensors:
        infos = read_header(file.path)
        check_module(file, expected, {key: info.shape for key, info in infos.items()})
        mapped = MappedTensors(infos)
        return {strip_module(key): mapped.read(key).clone() for key in infos}
    loaded = read_pt(file.path)
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{file.path}: expected a dictionary of tensors")
    check_module(file, expected, {key: tuple(value.shape) for key, value in loaded.items()})
    return {strip_module(key): value for key, value in loaded.items()}


def refuse_not_finite(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises `CheckpointError` where a weight is NaN or infinite: whatever the input, so would be the actions."""
    broken = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise CheckpointError(
            f"{where}: values that are not finite in {', '.join(broken[:3])}{more}: the file was damaged, or the "
            "training that wrote it diverged; take another checkpoint"
        )


def look_at_weights(folder: Path, most_bytes: int) -> None:
    """Raises `CheckpointError` where a checkpoint's files of modules hold NaN or infinities; and its model, where that
    has at most `most_bytes`: a larger one is looked at when it is loaded.

    Files that cannot be read are not its business, nor are `.pt` files of whole models.
    """
    # Published VLA-Adapters name no step: `action_head--checkpoint.pt`.
    modules = sorted(folder.glob("*--*checkpoint.*"))
    model = sorted(folder.glob("model*.safetensors"))
    if sum(path.stat().st_size for path in model) <= most_bytes:
        modules += model
    for path in modules:
        if path.suffix == ".safetensors":
            mapped = MappedTensors(read_header(path))
            for key in mapped:
                refuse_not_finite(str(path), {key: mapped.read(key)})
            mapped.give_back()
        elif path.suffix == ".pt":
            loaded = read_pt(path, mapped=True)
            tensors = loaded.items() if isinstance(loaded, dict) else ()
            refuse_not_finite(str(path), {key: value for key, value in tensors if isinstance(value, Tensor)})


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # One pass without a tensor of its own; NaN passes through.
    return all(math.isfinite(bound.item()) for bound in torch.aminmax(tensor))


def stand_in(shape: Shape, dtype: torch.dtype) -> Tensor:
    """A tensor of NaN that takes the memory of one element: never write to it."""
    # NaN, so that a weight that nobody filled in shows in the first loss.
    return torch.full((1,), torch.nan, dtype=dtype).expand(shape)


def load_weights(policy: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies weights under the policy's names (`policy.state_dict()`) into the policy, cast to its dtype.

    Raises:
        CheckpointError: a name or shape does not fit; the policy is unchanged then.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    refuse_shape_faults("weights of the policy", shape_faults(expected, given))
    policy.load_state_dict(state)


def base_state(where: str, base: BaseTensors, names: Mapping[str, str], dtype: torch.dtype) -> dict[str, Tensor]:
    """The pretrained weights under the policy's names; none shares memory with a file.

    Args:
        where: the checkpoint, for messages.
        base: its tensors.
        names: its keys -> names of parameters.
        dtype: of the parameters.

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """
    state = {}
    for key, name in names.items():
        tensor = base.read(key)
        refuse_not_finite(where, {key: tensor})
        state[name] = tensor.to(dtype, copy=True)
    base.give_back()
    return state


def module_state(
    folder: Path, expected: Mapping[str, Shapes], make: Callable[[str], nn.Module], seed: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of the modules that have files of their own, under the policy's names.

    Args:
        folder: the checkpoint.
        expected: of each module, the tensors it needs.
        make: builds the module of a name with random weights; called for those without a file.
        seed: of these weights.
        dtype: of the parameters.

    Returns:
        The weights, and the modules without a file.

    Raises:
        CheckpointError: a file cannot be read, does not hold what is expected, or holds NaN or infinities.
    """
    state: dict[str, Tensor] = {}
    fresh = []
    for name, shapes in expected.items():
        file = find_module(folder, name)
        if file is None:
            fresh.append(name)
            with torch.random.fork_rng(devices=[]):
                # For each anew: its weights do not depend on which of the others has a file.
                torch.manual_seed(seed)
                tensors = make(name).state_dict()
        else:
            tensors = read_module(file, shapes)
            refuse_not_finite(str(file.path), tensors)
        state |= {f"{name}.{key}": tensor.to(dtype) for key, tensor in tensors.items()}
    return state, fresh


def trained_modules(folder: Path, names: Iterable[str]) -> dict[str, ModuleFile]:
    """The files of modules without which the policy predicts nothing.

    Raises:
        CheckpointError: one of them, or the statistics, are missing: the policy was not trained, or has no units.
    """
    files = {name: find_module(folder, name) for name in names}
    missing = [name for name, file in files.items() if file is None]
    if missing:
        raise CheckpointError(f"{folder} has no {', '.join(missing)}: there is nothing to evaluate; fine-tune it first")
    if not (folder / "dataset_statistics.json").is_file():
        raise CheckpointError(f"{folder} has no dataset_statistics.json: its actions would have no units")
    return {name: file for name, file in files.items() if file is not None}


def write_tensors(tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> None:
    """Writes a safetensors file."""
    # safetensors refuses strides; transformers 4 refuses a file whose metadata name no format.
    stored = {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in tensors.items()}
    save_file(stored, path, metadata={"format": "pt"})


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when the block ends and vanishes when it fails; what a writer that
    was killed has left of `path` vanishes when the block begins.

    Raises:
        CheckpointError: `path` exists and is not an empty folder.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists already; choose another folder or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside `path`, for a rename works within one file system alone.
    begin, end = f".{path.name}.", ".partial"
    for left in path.parent.iterdir():
        if left.name.startswith(begin) and left.name.endswith(end) and left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=begin, suffix=end, dir=path.parent))
    try:
        # `mkdtemp` makes it for this user alone; a checkpoint is for others to read too.
        partial.chmod(0o755)
        yield partial
        if path.exists():
            path.rmdir()
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def split_modules(
    weights: Mapping[str, Tensor], names: Iterable[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Weights under the policy's names -> those of each module that has a file of its own, and the others.

    The modules' keys lose the module's name; a module that is not there is left out.
    """
    modules: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    rest = {}
    for name, tensor in weights.items():
        module, _, key = name.partition(".")
        if module in modules:
            modules[module][key] = tensor
        else:
            rest[name] = tensor
    return {name: tensors for name, tensors in modules.items() if tensors}, rest


class SaveOptions(TypedDict, total=False):
    """What `save_policy` is told beside the weights, whatever the backbone."""

    lora_alpha: float | None
    """Of the adapters among the weights, which are merged; none means the published recipe's."""
    keep_adapter: bool
    """Write the adapters to `lora_adapter/` as well, where the backbone's published folders have one."""

    dtype: Required[torch.dtype]
    """Of the stored weights."""
    step: int
    """Training step, part of the file names of modules; 0 where none is given."""
    statistics: Mapping[str, object] | None
    """Contents of `dataset_statistics.json`; none takes over the base's."""
    trained_for: Mapping[str, object] | None
    """The entries of `PolicySizes`, `normalization` and `images` (see `predict`), which become `policy` in
    `config.json`; what `load_policy` and `predict` are not told, they take from there."""


@contextmanager
def new_checkpoint(
    out: str | Path,
    base: Path,
    companions: Iterable[str],
    config: Mapping[str, object],
    model: Mapping[str, Tensor],
    modules: Mapping[str, Mapping[str, Tensor]],
    expected: Mapping[str, Shape],
    **options: Unpack[SaveOptions],
) -> Iterator[Path]:
    """A checkpoint folder with configuration, statistics, weights and what is taken over from the base.

    More can be written into it within the block; it becomes `out` when the block ends, and vanishes when it fails.

    Args:
        out: new folder.
        base: the checkpoint that training started from.
        companions: its files that are copied where they are there.
        config: contents of `config.json`.
        model: tensors of `model.safetensors`.
        modules: tensors of each `<module>--<step>_checkpoint.safetensors`.
        expected: keys and shapes of `model`.
        options: see `SaveOptions`.

    Raises:
        CheckpointError: `out` exists and is not empty, or `model` holds other tensors.
        OSError: nothing could be written, for instance because the disk is full; `out` does not exist then.
    """
    trained = {key: tuple(tensor.shape) for key, tensor in model.items()}
    refuse_shape_faults("weights to save", shape_faults(expected, trained))
    dtype, statistics, trained_for = options["dtype"], options.get("statistics"), options.get("trained_for")
    with new_folder(Path(out)) as made:
        for name in companions:
            if (base / name).is_file():
                shutil.copyfile(base / name, made / name)
        if statistics is not None:
            write_json(made / "dataset_statistics.json", statistics)
        written = published_config(config, str(dtype).removeprefix("torch."))
        write_json(made / "config.json", written | ({"policy": dict(trained_for)} if trained_for else {}))
        for name, tensors in modules.items():
            # As openvla-oft's files have it, which are saved from inside DistributedDataParallel.
            prefixed = {f"module.{key}": tensor for key, tensor in tensors.items()}
            write_tensors(prefixed, made / f"{name}--{options.get('step', 0)}_checkpoint.safetensors", dtype)
        write_tensors(model, made / "model.safetensors", dtype)
        yield made


def write_modules(
    out: Path, files: Mapping[str, ModuleFile], expected: Mapping[str, Shapes], dtype: torch.dtype | None
) -> None:
    """Writes each module's `<name>--<step>_checkpoint.pt`, with the prefix `module.`.

    Args:
        out: folder.
        files: of each module, the file to read.
        expected: of each module, the tensors it needs.
        dtype: none keeps what is stored.

    Raises:
        CheckpointError: a file does not hold what is expected.
    """
    for name, file in files.items():
        tensors = {f"module.{key}": cast(tensor, dtype) for key, tensor in read_module(file, expected[name]).items()}
        torch.save(tensors, out / published_name(name, file))


def published_name(module: str, file: ModuleFile) -> str:
    """Name of the `.pt` file of a module that was read from `file`."""
    return f"{module}--{'latest' if file.step < 0 else file.step}_checkpoint.pt"


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in `dtype`, or as it is."""
    return tensor if dtype is None else tensor.to(dtype)
