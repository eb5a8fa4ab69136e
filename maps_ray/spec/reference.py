"""The reference of all fields of a spec, made from its model: `maps-ray fields`, and docs/*-spec.md."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined


def reference(model: type[BaseModel], title: str, command: str, example: str) -> str:
    """Markdown: one table per section with field, type, default and meaning.

    Args:
        model: of the spec.
        title: what the spec is called.
        command: that prints this reference.
        example: of a field and its value on the command line.
    """
    lines = [
        f"# The {title}",
        "",
        f"Every field of a {title}, as `{command}` prints it. Unknown fields are refused.",
        f"Each field can be set on the command line: `--set {example}`.",
        "Values are YAML 1.2: a text that looks like a number, a list or a mapping stands in quotes, as in",
        "`--set 'name=\"2026\"'`.",
        "",
        *_section("", model),
    ]
    return "\n".join(lines).rstrip() + "\n"


@dataclass(frozen=True)
class FieldRow:
    """One field of a spec."""

    field: str
    """Dotted, as `--set` takes it."""
    type: str
    default: str
    meaning: str


def rows(model: type[BaseModel], path: str = "") -> Iterator[FieldRow]:
    """All fields of a spec, each section's own before those of the sections in it."""
    nested: list[tuple[type[BaseModel], str]] = []
    for name, field in model.model_fields.items():
        inner = section_in(field.annotation)
        here = f"{path}.{name}".lstrip(".")
        if inner is not None:
            nested.append((inner, here))
        yield FieldRow(here, _type(field.annotation), _default(field, inner), _meaning(field, inner))
    for inner, here in nested:
        yield from rows(inner, here)


def _section(path: str, model: type[BaseModel]) -> list[str]:
    lines = [f"## `{path}`" if path else "## Top level", "", " ".join((model.__doc__ or "").split()), ""]
    lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
    nested: list[str] = []
    for row in rows(model, path):
        section, _, name = row.field.rpartition(".")
        if section != path:
            break
        cells = [f"`{name}`", row.type, row.default, row.meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    for name, field in model.model_fields.items():
        inner = section_in(field.annotation)
        if inner is not None:
            nested += _section(f"{path}.{name}".lstrip("."), inner)
    return [*lines, "", *nested]


def _meaning(field: FieldInfo, inner: type[BaseModel] | None) -> str:
    return " ".join((field.description or (inner.__doc__ if inner else "") or "").split())


def section_in(annotation: object) -> type[BaseModel] | None:
    """The model of a field that is a section, or a list of sections."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(section_in, get_args(annotation))), None)


def _default(field: FieldInfo, inner: type[BaseModel] | None) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return "none"
    return "" if inner is not None else f"`{field.default}`"


def _type(annotation: object) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _type(get_args(annotation)[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    # Two types for one thing up to Python 3.13: `X | Y`, and what `typing` makes where it cannot be written so.
    if origin is types.UnionType or str(origin) == "typing.Union":
        return " or ".join(_type(kind) for kind in get_args(annotation) if kind is not type(None))
    if origin in (list, tuple):
        return f"{origin.__name__} of {_type(get_args(annotation)[0])}"
    if section_in(annotation) is not None:
        return "section"
    return str(getattr(annotation, "__name__", annotation)).lower()
