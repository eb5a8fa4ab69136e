"""From a YAML file and `--set` overrides to a `RunSpec`, or to a `SpecError` that lists everything wrong."""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from maps_ray.spec.cluster_spec import ClusterSpec
from maps_ray.spec.credentials import take_credentials
from maps_ray.spec.paths import absolute, escape, expand, unescape
from maps_ray.spec.problems import Problem, SpecError, nearest
from maps_ray.spec.reference import section_in
from maps_ray.spec.run_spec import RunSpec

# What a spec reads: relative to the spec's file, or to the working directory in an override.
_INPUTS = (("model", "checkpoint"), ("data", "path"), ("tracking", "credentials"))
# An address: nothing is relative.
_URI = ("tracking", "uri")
# What it writes: relative to the working directory.
_OUTPUTS = (("cluster", "storage"), ("cluster", "scratch"), ("data.cache", "folder"))

Model = TypeVar("Model", bound=BaseModel)
Raw = dict[str, object]
"""A section as YAML has it, before it is checked."""


def load_spec(path: str | Path, overrides: Iterable[str] = ()) -> RunSpec:
    """Reads and checks a run spec.

    With `base: other.yaml` it builds on another spec: sections are merged field by field, lists and values replace.

    In its paths `~` and variables of the environment are replaced. Credentials in `tracking.uri` go into the
    environment of this process, see `maps_ray.spec.credentials`.

    Args:
        path: YAML file. `base`, `model.checkpoint` and the paths of `data` are relative to it; `cluster.storage`,
            `cluster.scratch` and `data.cache.folder` are relative to the working directory.
        overrides: `dotted.field=value` strings; the value is YAML, paths are relative to the working directory. A
            number in the dotted field is the place in a list: `data.sources.0.weight=2`.

    Returns:
        The spec, its paths absolute: workers run in other directories.

    Raises:
        SpecError: the file or its base cannot be read, is not plain YAML, or a field is unknown, missing or out of
            range.
    """
    raw = apply_overrides(_read_with_base(Path(path)), overrides)
    _take_credentials(raw)
    cluster = raw.setdefault("cluster", {})
    if isinstance(cluster, dict):
        # Given, so that it is made absolute as well: pydantic's default would be relative to wherever a worker runs.
        cluster.setdefault("storage", str(ClusterSpec.model_fields["storage"].default))
    _make_absolute(raw, (*_INPUTS, *_OUTPUTS, _URI), Path.cwd())
    _unescape(raw)
    return parse(RunSpec, raw)


def _read_with_base(path: Path, above: tuple[Path, ...] = ()) -> Raw:
    """The mapping of a file, laid over that of its `base`. Paths are made absolute first: each file has its own folder.

    Args:
        path: YAML file.
        above: the files that build on this one, to find circles.
    """
    raw = read_yaml(path)
    file = path.resolve()
    if file in above:
        circle = " -> ".join(entry.name for entry in (*above[above.index(file) :], file))
        raise SpecError([Problem("base", path.name, f"the specs build on each other in a circle: {circle}")])
    base = raw.pop("base", None)
    _take_credentials(raw)
    _make_absolute(raw, _INPUTS, file.parent)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise SpecError([Problem("base", base, "must be the path of another run spec, relative to this one")])
    try:
        under = Path(absolute(base, file.parent))
    except ValueError as error:
        raise SpecError([Problem("base", base, str(error))]) from None
    return _laid_over(_read_with_base(under, (*above, file)), raw)


def _laid_over(under: Raw, over: Mapping[str, object]) -> Raw:
    merged = dict(under)
    for name, value in over.items():
        below = merged.get(name)
        merged[name] = _laid_over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def read_dumped(path: Path) -> RunSpec:
    """Reads back what `dump` wrote of a run spec. Its paths are absolute: this needs no working directory, which a job
    on a node that was lost may have lost too.

    Raises:
        SpecError: the file cannot be read, or is no such spec.
    """
    raw = read_yaml(path)
    _unescape(raw)
    return parse(RunSpec, raw)


def read_yaml(path: str | Path) -> Raw:
    """Reads a YAML mapping without constructing any Python object.

    Raises:
        SpecError: missing file, syntax error (with line), object tags, a repeated key, or no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError([Problem("", str(path), f"cannot read spec {path}: {error}")]) from None
    raw = _yaml(text, str(path))
    if not isinstance(raw, dict):
        raise SpecError([Problem("", raw, f"{path}: a spec is a mapping of sections, found {type(raw).__name__}")])
    return raw


def apply_overrides(raw: Mapping[str, object], overrides: Iterable[str]) -> Raw:
    """A copy of `raw` with each `dotted.field=value` set.

    Raises:
        SpecError: an override without `=`, or a path through a field that is no section.
    """
    result = copy.deepcopy(dict(raw))
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            raise SpecError([Problem("--set", override, "write it as section.field=value")])
        section: object = result
        for key in keys[:-1]:
            if isinstance(section, list):
                section = section[_place(section, key, dotted, text)]
            elif isinstance(section, dict):
                section = section.setdefault(key, {})
            if not isinstance(section, dict | list):
                raise SpecError([Problem(dotted, text, f"{key!r} is a value, not a section")])
        value = _yaml(text, f"--set {override}")
        if isinstance(section, list):
            section[_place(section, keys[-1], dotted, text)] = value
        elif isinstance(section, dict):
            section[keys[-1]] = value
    return result


def _place(items: Sequence[object], key: str, dotted: str, text: str) -> int:
    if not key.isdecimal() or int(key) >= len(items):
        raise SpecError([Problem(dotted, text, f"{key!r} is no place in a list of {len(items)}; count from 0")])
    return int(key)


def parse(model: type[Model], raw: Mapping[str, object]) -> Model:
    """Validates plain data as `model`; collects every fault before it raises `SpecError`."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise SpecError([_problem(model, fault) for fault in error.errors()]) from None


def dump(spec: BaseModel) -> str:
    """The resolved spec as YAML; `load_spec` reads it back unchanged."""
    raw = spec.model_dump(mode="json")
    for section, field, text, _ in _paths(raw, (*_INPUTS, *_OUTPUTS, _URI)):
        section[field] = escape(text)
    return to_yaml(raw)


def to_yaml(content: object, *, sort_keys: bool = False, width: int = 80) -> str:
    """Plain values as YAML that `read_yaml` reads back unchanged; lines of about `width` characters."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=sort_keys, allow_unicode=True, width=width)


def _make_absolute(raw: Raw, fields: Iterable[tuple[str, str]], base: Path) -> None:
    """Expands paths, joins them to `base`, and writes them as `dump` does: this can be done again."""
    for section, field, text, name in _paths(raw, fields):
        try:
            section[field] = escape(expand(text) if name == ".".join(_URI) else absolute(text, base))
        except ValueError as error:
            raise SpecError([Problem(name, text, str(error))]) from None


def _unescape(raw: Raw) -> None:
    for section, field, text, _ in _paths(raw, (*_INPUTS, *_OUTPUTS, _URI)):
        section[field] = unescape(text)


def _paths(raw: Raw, fields: Iterable[tuple[str, str]]) -> Iterator[tuple[Raw, str, str, str]]:
    """The fields that are given and hold a path, and the paths of all sources: section, name in it, path, dotted
    name."""
    for path, field in fields:
        section: object = raw
        for name in path.split("."):
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(text := section.get(field), str):
            yield section, field, text, f"{path}.{field}"
    data = raw.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    for place, source in enumerate(sources if isinstance(sources, list) else ()):
        if isinstance(source, dict) and isinstance(text := source.get("path"), str):
            yield source, "path", text, f"data.sources.{place}.path"


def _take_credentials(raw: Raw) -> None:
    tracking = raw.get("tracking")
    if isinstance(tracking, dict) and isinstance(uri := tracking.get("uri"), str):
        tracking["uri"] = take_credentials(uri)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses repeated keys, and reads `1e-4` as a number as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        # Before `super` lays in what `<<` merges: a key that overrides a merged one stands once in the file.
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if isinstance(key, str) and keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a text which `_Loader` would read as a number, such as a camera named `0e0`."""


_Loader.add_constructor("tag:maps_ray,2026:float", lambda loader, node: float(node.value))
_NUMBER = ("tag:maps_ray,2026:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(*_NUMBER)
_Dumper.add_implicit_resolver(*_NUMBER)


def _yaml(text: str, where: str) -> object:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.constructor.ConstructorError as error:
        if "python/" in str(error.problem) or "could not determine a constructor" in str(error.problem):
            message = f"{where}: {error.problem}{_line(error)}; a spec holds plain values only, never Python objects"
        else:
            message = f"{where}: {error.problem}{_line(error)}"
        raise SpecError([Problem("", text, message)]) from None
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        raise SpecError([Problem("", text, f"{where}: not valid YAML: {problem}{_line(error)}")]) from None


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""


def _problem(model: type[BaseModel], fault: ErrorDetails) -> Problem:
    """Turns one pydantic error into a problem that names the allowed values or the nearest field."""
    location = [
        part
        for part in fault["loc"]
        # The branch of a union, which pydantic names in a location too.
        if not (isinstance(part, str) and part.startswith(("function-", "literal", "float", "constrained")))
    ]
    field = ".".join(str(part) for part in location)
    if fault["type"] == "extra_forbidden":
        section = _section_at(model, location[:-1])
        return Problem(field, fault["input"], f"unknown field; {nearest(str(location[-1]), section.model_fields)}")
    if fault["type"] == "missing":
        return Problem(field, None, "required, but missing")
    if fault["type"] == "literal_error":
        return Problem(field, fault["input"], f"must be one of {fault['ctx']['expected']}")
    if fault["type"] == "model_type":
        return Problem(
            field, fault["input"], f"a section: its fields are {', '.join(_section_at(model, location).model_fields)}"
        )
    message = str(fault["msg"]).removeprefix("Value error, ")
    return Problem(field, fault["input"], message[0].lower() + message[1:])


def _section_at(model: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel]:
    for part in location:
        field = model.model_fields.get(str(part))
        annotation = None if field is None else field.annotation
        model = section_in(annotation) or model
    return model
