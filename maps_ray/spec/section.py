"""What all sections of a spec share: strict fields, and the types of their values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from maps_ray.spec.credentials import refuse_credentials
from maps_ray.spec.paths import place


def _no_switch(value: object) -> object:
    # Python takes true for 1: `weight_decay: true` would decay by 1.
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


Whole = Annotated[int, BeforeValidator(_no_switch)]
Real = Annotated[float, BeforeValidator(_no_switch)]
Count = Annotated[Whole, Field(ge=1)]
NonNegativeInt = Annotated[Whole, Field(ge=0)]
NonNegative = Annotated[Real, Field(ge=0)]
Decay = Annotated[Real, Field(ge=0, lt=1)]
Positive = Annotated[Real, Field(gt=0)]
# As far as torch's generators take one, and the seeds of a sweep's trials after it.
Seed = Annotated[Whole, Field(ge=0, lt=2**63)]
Name = TypeVar("Name", str, int)
EpisodeSlice = Annotated[str, Field(pattern=r"^(-?[0-9]+)?:(-?[0-9]+)?$")]
# A folder or a URI: `pathlib` would make one slash of the two after `s3:`.
Location = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
StoragePlace = Annotated[Path | str, BeforeValidator(place)]


def source_name(path: str) -> str:
    """The last part of a path that is no version: `libero_90` of `s3://bucket/libero_90/1.0.0`."""
    parts = [part for part in re.split(r"[/\\]", path.split("://")[-1]) if part]
    named = [part for part in parts if not re.fullmatch(r"v?\d+(\.\d+)*", part)] or parts or ["data"]
    return named[-1].partition("@")[0].removesuffix(".hdf5")


def each_once(names: list[Name], what: str) -> list[Name]:
    repeated = sorted({str(name) for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{what} named twice: {', '.join(repeated)}")
    return names


class Section(BaseModel):
    """Base of all sections: unknown fields, NaN, infinities and credentials are refused; a spec never changes after it
    was read."""

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        frozen=True,
        validate_default=True,
        # A field's docstring is its description, which `maps-ray fields` prints.
        use_attribute_docstrings=True,
    )

    # Before the types: a `Path` has lost one of the two slashes that an address is known by.
    @field_validator("*", mode="before")
    @classmethod
    def _no_credentials(cls, value: object) -> object:
        # A section inside this one looks at its own fields.
        if not isinstance(value, dict | BaseModel):
            refuse_credentials(value)
        return value
