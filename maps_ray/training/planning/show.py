"""A plan as tables, and as plain data."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from maps_ray.devices import GIB
from maps_ray.training.planning.plan import RESERVED, Choice, Plan, Verdict


def as_data(plan: Plan, price: float | None) -> dict[str, object]:
    """The plan as JSON takes it; bytes, seconds and operations."""
    counts = plan.subject.counts
    return {
        "name": plan.spec.name,
        "model": plan.spec.model.name,
        "ranks": plan.ranks,
        "zero_stage": plan.spec.training.zero_stage,
        "tokens_per_sample": plan.subject.tokens,
        "parameters": {
            "all": counts.trained + counts.frozen,
            "trained": counts.trained,
            "frozen": counts.frozen,
            "anchored": counts.anchored,
            "without_gradient": counts.without_gradient,
        },
        "flops_per_sample": {"model": plan.model_flops, "hardware": plan.chosen.hardware_flops},
        "stages": {str(stage): _choice(choice) for stage, choice in plan.stages.items()},
        "devices": [_verdict(verdict, price) for verdict in plan.verdicts],
        "utilisation": None if plan.measured else plan.utilisation,
        "assumptions": plan.assumptions,
    }


def _choice(choice: Choice) -> dict[str, object]:
    return {
        "device_bytes": choice.device_bytes,
        "host_bytes": choice.host_bytes,
        "terms": [
            {
                "name": term.name,
                "bytes": term.bytes,
                "phase": term.phase,
                "place": "host" if term.host else "device",
                "why": term.why,
            }
            for term in choice.terms
            if term.bytes
        ],
    }


def _verdict(verdict: Verdict, price: float | None) -> dict[str, object]:
    return {
        "device": verdict.device.name,
        "memory_bytes": verdict.device.memory,
        "fits": verdict.fits,
        "proposals": [{"set": changes, "device_bytes": choice.device_bytes} for changes, choice in verdict.proposals],
        "samples_per_second": verdict.samples_per_second,
        "seconds": verdict.seconds,
        "gpu_hours": verdict.gpu_hours,
        "cost": None if price is None else verdict.gpu_hours * price,
    }


def print_plan(plan: Plan, price: float | None) -> None:
    """Prints the plan."""
    console = Console()
    training, counts = plan.spec.training, plan.subject.counts
    everything = counts.trained + counts.frozen
    console.print(
        f"{plan.spec.name}: {plan.spec.model.name}, {everything / 1e6:,.1f} M parameters, "
        f"{counts.trained / 1e6:,.1f} M trained, {counts.anchored / 1e6:,.1f} M of them anchored; "
        f"{plan.ranks} x {training.batch_size} x {training.gradient_accumulation} samples a step, "
        f"{plan.subject.tokens} tokens each",
        soft_wrap=True,
    )
    console.print(_memory(plan))
    console.print(_devices(plan, price))
    for verdict in plan.verdicts:
        _print_remedy(console, plan, verdict)
    console.print("Assumed:")
    for text in plan.assumptions:
        # Paths may have brackets, which are rich's markup.
        console.print(f"- {text}", soft_wrap=True, markup=False)


def _memory(plan: Plan) -> Table:
    table = Table("GiB of one rank", title=f"Memory under each ZeRO stage (the spec's is {plan.chosen.setup.stage})")
    for stage in plan.stages:
        table.add_column(f"stage {stage}", justify="right")
    table.add_column("when")
    table.add_column("what")
    by_stage = {
        stage: {term.name: term for term in choice.terms if term.bytes} for stage, choice in plan.stages.items()
    }
    names = list(dict.fromkeys(name for named in by_stage.values() for name in named))
    for name in names:
        own = [named.get(name) for named in by_stage.values()]
        first = by_stage[plan.chosen.setup.stage].get(name) or next(term for term in own if term is not None)
        cells = [f"{term.bytes / GIB:.2f}" if term is not None else "" for term in own]
        table.add_row(name + (" (host)" if first.host else ""), *cells, first.phase, first.why)
    table.add_section()
    totals = [f"{choice.device_bytes / GIB:.2f}" for choice in plan.stages.values()]
    table.add_row("at the worst moment", *totals, "", f"and {RESERVED / GIB:.0f} reserved")
    return table


def _devices(plan: Plan, price: float | None) -> Table:
    pace = f"at {plan.utilisation:.0%} of the peak" if plan.measured is None else "as measured"
    table = Table("device", title=f"{plan.ranks} devices, {pace}")
    for column in ("GiB", "fits", "samples/s", "days", "GPU hours", *(("cost",) if price is not None else ())):
        table.add_column(column, justify="right")
    for verdict in plan.verdicts:
        cells = [f"{verdict.device.memory / GIB:.1f}", "yes" if verdict.fits else "no"]
        cells += [f"{verdict.samples_per_second:,.1f}", f"{verdict.seconds / 86400:.2f}", f"{verdict.gpu_hours:,.0f}"]
        cells += [f"{verdict.gpu_hours * price:,.0f}"] if price is not None else []
        table.add_row(verdict.device.name, *cells)
    return table


def _print_remedy(console: Console, plan: Plan, verdict: Verdict) -> None:
    if verdict.fits:
        return
    if not verdict.proposals:
        console.print(f"{verdict.device.name}: nothing makes it fit {plan.ranks} of these; take more, or larger ones")
        return
    console.print(f"{verdict.device.name}: it fits with one of")
    for changes, choice in verdict.proposals:
        settings = " ".join(f"--set {name}={str(value).lower()}" for name, value in changes.items())
        console.print(f"  {settings}  ({choice.device_bytes / GIB:.1f} GiB)", soft_wrap=True, markup=False)
