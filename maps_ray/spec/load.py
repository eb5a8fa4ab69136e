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
from maps_ray.spec.paths import absolute, escape, expand, on_this_machine, unescape
from maps_ray.spec.problems import Problem, SpecError, nearest
from maps_ray.spec.reference import section_in
from maps_ray.spec.run_spec import RunSpec

# What a spec reads: relative to the spec's file, or to the working directory in an override.
_INPUTS = (("model", "checkpoint"), ("data", "path"), ("tracking", "credentials"))
# An address: nothing is relative.
_URI = ("tracking", "uri")
# What it writes: relative to the working directory.
_OUTPUTS = (("cluster", "storage"), ("cluster", "scratch"), ("data.cache", "folder"))
# Read or written on the machine itself, never on an object store.
_LOCAL = ("model.checkpoint", "tracking.credentials", "cluster.scratch", "data.cache.folder")

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
    resolve_paths(raw, Path.cwd())
    return parse(RunSpec, raw)


def resolve_paths(raw: Raw, base: Path) -> None:
    """Expands the paths of a raw run spec, or of some of its sections, and makes them absolute below `base`.

    Raises:
        SpecError: that cannot be done.
    """
    _make_absolute(raw, (*_INPUTS, *_OUTPUTS, _URI), base)
    _unescape(raw)


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
                # As a resolved spec has an optional section that is not given: `lora: null`.
                if section.get(key) is None:
                    section[key] = {}
                section = section[key]
            if not isinstance(section, dict | list):
                whole = ".".join(keys[: keys.index(key) + 1])
                message = f"{key!r} is a value, not a section; to make it one, set it whole: {whole}={{field: value}}"
                raise SpecError([Problem(dotted, text, message)])
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
            place = on_this_machine(text) if name in _LOCAL else text
            section[field] = escape(expand(place) if name == ".".join(_URI) else absolute(place, base))
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
    """SafeLoader that refuses repeated keys and rings of aliases, and reads plain values as YAML 1.2 does: `1e-4` is a
    number and `0123` is 123, while `8:16`, `2026-11-28` and `no` are texts."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        node = super().compose_node(parent, index)
        # One that an alias names before it has come to its end is inside itself.
        if node is not None and node.end_mark is None:
            raise yaml.constructor.ConstructorError(None, None, "an alias names what it stands in", node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        # Before `super` lays in what `<<` merges: a key that overrides a merged one stands once in the file.
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE]
        for key in keys:
            if isinstance(key, str) and keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a text which `_Loader` would read as a number, such as a camera named `0e0`."""


_MERGE = "tag:yaml.org,2002:merge"
_INT, _FLOAT = "tag:maps_ray,2026:int", "tag:maps_ray,2026:float"
_Loader.add_constructor(_INT, lambda loader, node: int(node.value))
_Loader.add_constructor(_FLOAT, lambda loader, node: float(re.sub(r"\.(?=[in])", "", node.value.lower())))
# YAML 1.2.2, 10.3.2, and `_` between digits, in place of those of 1.1. The first that matches counts.
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
    (_INT, r"[-+]?\d+(_\d+)*", list("-+0123456789")),
    (_FLOAT, r"[-+]?(\.\d+|\d+(_\d+)*(\.\d*)?)([eE][-+]?\d+)?", list("-+.0123456789")),
    (_FLOAT, r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
    (_MERGE, "<<", ["<"]),
):
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$", re.ASCII), _first)
_Dumper.add_implicit_resolver(_FLOAT, re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


# `*`, `%`, `@`, `: ` and others have a meaning of their own.
_QUOTES = "; a text with such a character goes in quotes"


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
        raise SpecError([Problem("", text, f"{where}: not valid YAML: {problem}{_line(error)}{_QUOTES}")]) from None
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits, lists in lists without end.
        raise SpecError([Problem("", text, f"{where}: cannot be read: {error}")]) from None


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""


def _problem(model: type[BaseModel], fault: ErrorDetails) -> Problem:
    """Turns one pydantic error into a problem that names the allowed values or the nearest field."""
    location = [
        part
        for part in fault["loc"]
        # The branch of a union, which pydantic names in a location too.
        if not (isinstance(part, str) and re.match(r"(function-|literal|float|constrained|lax-or)|\w+Spec$", part))
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
    message = str(fault["msg"]).removeprefix("Value error, ") + _REMEDIES.get(fault["type"], "")
    return Problem(field, fault["input"], message[0].lower() + message[1:])


# Of a value that YAML has read as something else.
_REMEDIES = {
    "string_type": """: where it is one, put it in quotes, as in "123" (in a shell: --set 'FIELD="123"')""",
    "list_type": ": write it as [a, b]",
    "tuple_type": ": write it as [a, b]",
}


def _section_at(model: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel]:
    for part in location:
        field = model.model_fields.get(str(part))
        annotation = None if field is None else field.annotation
        model = section_in(annotation) or model
    return model
