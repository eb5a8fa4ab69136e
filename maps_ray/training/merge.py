"""`maps-ray merge`: the weights of a finished run, drawn back toward its base module by module, without training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from maps_ray.evaluation.rollouts.checkpoint import fingerprint
from maps_ray.files import read_json, seen
from maps_ray.models import CheckpointError, describe, local_folder, open_weights
from maps_ray.proximity.schedule import ScheduleError, module_tensors, schedule
from maps_ray.proximity.stack import StackError, assign
from maps_ray.spec import Problem, RunSpec, SpecError, load_spec
from maps_ray.training.run_folder import BASE_FILE


def merge(
    run: Path,
    out: Path,
    *,
    weights: Mapping[str, float] | None = None,
    lines: Sequence[float] | None = None,
    base: Path | None = None,
    wait_s: float = 0,
) -> Path:
    """Writes a checkpoint with theta = (1 - a) theta0 + a theta.

    Args:
        run: folder of a finished run. Of a run with LoRA the merged weights are taken.
        out: new folder. It appears only when it is complete.
        weights: module or group -> a in [0, 1]: 0 is the base, 1 the trained weights, which modules that are left out
            keep. Modules without pretrained weights are always the trained ones.
        lines: a of the first and of the last layer of the run's `proximity.order`; it grows linearly between them.
        base: where the base is now, if it moved; it must be the same.
        wait_s: how long to look for a run that has finished on another node just now.

    Returns:
        `out`.

    Raises:
        SpecError: neither or both of `weights` and `lines`, a value outside [0, 1], an unknown module, no finished run,
            another base, weights that do not fit, or `out` exists. Nothing is written then.
        OSError: nothing could be written; `out` does not exist then.
    """
    from maps_ray.models.merge import merge_folders

    if (weights is None) == (lines is None):
        raise SpecError([Problem("--weights", weights and dict(weights), "give either --weights or --lines")])
    spec = finished_run(run, wait_s)
    start = base or local_folder(spec.model.checkpoint)
    same_base(run, start, "model.checkpoint" if base is None else "--base")
    trained = run / "final"
    try:
        info = describe(trained, name=spec.model.name)
        owners = assign(info.stack, info.parameters)
        if lines is not None:
            _in_range({f"--lines, {place}": value for place, value in zip(("first", "last"), lines, strict=False)})
            if len(lines) != 2:
                raise SpecError([Problem("--lines", list(lines), "give two numbers: --lines 0.2,0.8")])
            # LiNeS (arXiv 2410.17146) scales what was learned by a layer's place in line, which a linear schedule from
            # 1 to 0 tells.
            held = schedule(info.stack, spec.proximity.order, "linear", 1.0, "layer")
            of_layer = {name: lines[1] - (lines[1] - lines[0]) * share for name, share in held.items()}
            chosen = {name: of_layer[layer.name] for name, layer in owners.items() if layer.pretrained}
        else:
            assert weights is not None
            _in_range({f"--weights {module}": value for module, value in weights.items()})
            named = module_tensors(info.stack, owners, weights, "--weights")
            chosen = {name: weights[module] for name, module in named.items()}
        record = {
            "run": str(run) if isinstance(spec.cluster.storage, Path) else spec.run_place,
            "base": str(start),
            "rule": "theta = (1 - a) theta0 + a theta",
            "weights": weights and dict(weights),
            "lines": lines and list(lines),
        }
        opened, key_of = open_weights(start, name=spec.model.name)
        weight_of = {key_of(name): value for name, value in chosen.items()}
        return merge_folders(opened, trained, out, weight_of, {k: v for k, v in record.items() if v is not None})
    except ScheduleError as error:
        raise SpecError([Problem(error.field, str(weights or lines), str(error))]) from None
    except (CheckpointError, StackError) as error:
        raise SpecError([Problem("RUN", str(run), str(error))]) from None


def parse_weights(text: str) -> dict[str, float]:
    """`dinov2=0.5,language=0.2` as a mapping.

    Raises:
        SpecError: not of this form, or a module named twice.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        module, equals, value = part.partition("=")
        try:
            number = float(value)
        except ValueError:
            equals = ""
        if not equals or not module.strip() or module.strip() in weights:
            raise SpecError([Problem("--weights", text, "give each module once: --weights dinov2=0.5,language=0.2")])
        weights[module.strip()] = number
    return weights


def parse_lines(text: str) -> list[float]:
    """`0.2,0.8` as two numbers.

    Raises:
        SpecError: anything else.
    """
    try:
        first, last = (float(part) for part in text.split(","))
    except ValueError:
        raise SpecError([Problem("--lines", text, "give two numbers: --lines 0.2,0.8")]) from None
    return [first, last]


def _in_range(values: Mapping[str, float]) -> None:
    problems = [
        Problem(field, value, "must be in [0, 1]: 0 is the base, 1 the trained weights")
        for field, value in values.items()
        if not (math.isfinite(value) and 0 <= value <= 1)
    ]
    if problems:
        raise SpecError(problems)


def finished_run(run: Path, wait_s: float = 0) -> RunSpec:
    """The spec of a run.

    Args:
        run: its folder.
        wait_s: how long to look for what another node may have written just now.

    Raises:
        SpecError: no run is there, or it has not finished.
    """
    if not seen(run / "spec.yaml", wait_s):
        raise SpecError([Problem("RUN", str(run), "no folder of a run: it has no spec.yaml")])
    if not seen(run / "final" / "config.json", wait_s):
        message = "the run has not finished: continue it with `maps-ray train ... --resume` first"
        raise SpecError([Problem("RUN", str(run), message)])
    return load_spec(run / "spec.yaml")


def same_base(run: Path, base: Path, field: str) -> None:
    """Sees that a run started from this base.

    Args:
        run: its folder.
        base: folder of the base.
        field: that names it, for messages.

    Raises:
        SpecError: the base is not there, or another one.
    """
    if not base.is_dir():
        message = "the base that the run started from is not there: say where it is now with --base"
        raise SpecError([Problem(field, str(base), message)])
    recorded = read_json(run / BASE_FILE)
    if recorded is not None and recorded["fingerprint"] != fingerprint(base):
        message = (
            f"not the base that {run} started from ({recorded['checkpoint']}): its files differ. Weights between two "
            "models that were not trained from one another mean nothing; give the run's own base"
        )
        raise SpecError([Problem(field, str(base), message)])
