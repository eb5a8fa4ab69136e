"""What the pages of HTML have in common: their parts, and how templates are filled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from maps_ray.reports.plots import with_own_ids
from maps_ray.reports.table import percent


@dataclass(frozen=True)
class Card:
    """One big number at the top."""

    value: str
    tone: str
    """`better`, `worse` or `unclear`: the colour."""
    title: str
    note: str


@dataclass(frozen=True)
class Picture:
    title: str
    note: str
    svg: Markup


def fill(template: str, **values: object) -> str:
    """A template of `templates/`, filled; a name that it needs and does not get is an error."""
    environment = Environment(
        loader=PackageLoader("maps_ray.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    return environment.get_template(template).render(**values)


def pictures(section: str, made: Iterable[tuple[str, str, str | None]]) -> list[Picture]:
    """Titles, notes and SVGs as pictures of one section; those that were not drawn are left out."""
    return [
        Picture(title, note, Markup(with_own_ids(svg, f"{section}{index}")))
        for index, (title, note, svg) in enumerate(made)
        if svg
    ]
