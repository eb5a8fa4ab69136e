"""The tables of docs/sizing.md: what the planner says of the paper's policies on GPUs of each usual size.

python benchmarks/sizing.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maps_ray.devices import GIB, SIZES, device_named
from maps_ray.spec import RunSpec, load_spec
from maps_ray.training.planning.plan import Choice, _Planner
from maps_ray.training.planning.subject import Subject, read_subject

PAPER = Path(__file__).parents[1] / "jobs" / "paper"
RUNS: dict[str, tuple[str, list[str]]] = {
    "OpenVLA-OFT-7B, full": ("libero_openvla_oft.yaml", ["model.lora=null"]),
    "OpenVLA-OFT-7B, LoRA 32": ("libero_openvla_oft.yaml", []),
    "MiniVLA-OFT, full": ("libero_minivla_oft.yaml", []),
}
GPUS = (1, 4, 8, 16)


def spec_of(name: str, batch: int) -> RunSpec:
    file, changes = RUNS[name]
    return load_spec(PAPER / file, [*changes, f"training.batch_size={batch}"])


def largest(subjects: dict[bool, Subject], ranks: int, memory: Any) -> str:
    """The least change to the plain recipe at which one sample a GPU fits, and the most samples that then do."""
    for stage, again in ((2, False), (2, True), (3, False), (3, True)):
        planner = _Planner(subjects[again], ranks)

        def choice(batch: int, planner: _Planner = planner, stage: int = stage) -> Choice:
            return planner.choice(stage, batch, 1)

        fitting = [batch for batch in (1, 2, 4, 8, 16, 32, 64) if choice(batch).fits(memory)]
        if fitting:
            return f"{stage}{', checkpointing' if again else ''}: {fitting[-1]}"
    return "no"


def main() -> None:
    for name in RUNS:
        plain = read_subject(spec_of(name, 8))
        subjects = {False: plain, True: plain.changed(checkpointing=True)}
        counts = plain.counts
        print(f"\n### {name}\n")
        print(f"{(counts.trained + counts.frozen) / 1e9:.2f} G parameters, {counts.trained / 1e9:.2f} G trained; "
              f"{plain.tokens} tokens; {plain.profile(8).flops / 8e12:.1f} TFLOP a sample, "
              f"{subjects[True].profile(8).flops / 8e12:.1f} with checkpointing.\n")  # fmt: skip
        for again, subject in subjects.items():
            ones = ", ".join(f"{batch}: {subject.activations(batch) / GIB:.1f}" for batch in (1, 4, 8))
            print(f"Activations{', checkpointed' if again else ''}, GiB by samples: {ones}.")
        print("\n| GPUs | " + " | ".join(f"stage {stage}" for stage in (1, 2, 3)) + " | " + " | ".join(SIZES) + " |")
        print("|" + "---|" * (4 + len(SIZES)))
        for ranks in GPUS:
            planner = _Planner(plain, ranks)
            needs = [f"{planner.choice(stage, 1, 1).device_bytes / GIB:.1f}" for stage in (1, 2, 3)]
            cells = [largest(subjects, ranks, device_named(device)) for device in SIZES]
            print(f"| {ranks} | " + " | ".join([*needs, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
