"""Credentials stay out of specs: nothing that is written, shown or sent to MLflow may hold them.

A password in `tracking.uri` goes where MLflow looks for it, into the environment of this process and its children; in
any other field it is refused. What is shown of a value has its credentials blotted out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from maps_ray.spec.paths import expand

# Of MLflow's client, in the order of `user:password`.
_USER, _PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
VARIABLES = (_USER, _PASSWORD, "MLFLOW_TRACKING_TOKEN")

# Up to the last @: a password may hold any character, and its owner may have forgotten to encode it.
# Behind the @ of `hf://OWNER/NAME@REVISION` stands no host.
_USERINFO = re.compile(r"(?P<scheme>(?<![A-Za-z0-9+.\-])(?!hf://)[A-Za-z][A-Za-z0-9+.\-]*://)(?P<secret>\S*)@")
_WHOLE = re.compile(r"(?P<scheme>(?<![A-Za-z0-9+.\-])(?!hf://)[A-Za-z][A-Za-z0-9+.\-]*://)(?P<secret>.*)@", re.DOTALL)
# The same without a scheme, as in user:password@host:6379.
_BARE = re.compile(r"(?<![\w/@])(?P<scheme>)(?P<secret>[^\s/@:'\"]*:[^\s/@'\"]+)@(?=[\w\[])")
_SECRET = r"[\w.\-]*(?:passw|passphrase|pwd|token|secret|key|sig|auth|credential)[\w.\-]*"
_PARAMETER = re.compile(rf"(?P<name>[?&;#]{_SECRET}=)(?P<secret>[^\s&;#'\"]+)", re.IGNORECASE)


def redact(text: str) -> str:
    """A text with `***` in place of the credentials of every URI in it."""
    for pattern in (_USERINFO, _BARE):
        text = pattern.sub(lambda match: f"{match['scheme']}***@", text)
    return _PARAMETER.sub(lambda match: f"{match['name']}***", text)


def redacted(value: object) -> object:
    """A value of a spec with `***` in place of credentials, for messages."""
    if isinstance(value, str):
        return redact(_WHOLE.sub(lambda match: f"{match['scheme']}***@", value))
    if isinstance(value, dict):
        return {redacted(name): redacted(part) for name, part in value.items()}
    return [redacted(part) for part in value] if isinstance(value, list | tuple) else value


def has_credentials(text: str) -> bool:
    """Whether a value looks like an address with a user, a password or a key in it."""
    if "://" in text and _PARAMETER.search(text):
        return True
    return bool(_WHOLE.search(text) or _BARE.search(text))


def refuse_credentials(value: object) -> None:
    """Raises `ValueError`, without the value, where a text in it has credentials."""
    if any(has_credentials(text) for text in _texts(value)):
        raise ValueError(
            "holds credentials, which would stand in every record of the run: take them out; for MLflow set "
            f"{_USER} and {_PASSWORD} or {VARIABLES[2]}, or name a file with them in tracking.credentials"
        )


def take_credentials(uri: str) -> str:
    """A tracking URI without its user and password, which go into this process's environment, where MLflow looks.

    Variables that are set already stay as they are. Anything else that looks like a secret stays in, to be refused.
    """
    match = _WHOLE.match(uri)
    # A slash ends the host: an @ behind it belongs to a path.
    if match is None or not match["scheme"].startswith("http") or "/" in match["secret"]:
        return uri
    user, _, password = match["secret"].partition(":")
    for name, value in ((_USER, user), (_PASSWORD, password)):
        if value:
            os.environ.setdefault(name, _filled(value))
    return match["scheme"] + uri[match.end() :]


def _filled(value: str) -> str:
    """With variables of the environment replaced, as in a path; a password with a lone dollar sign stays as it is."""
    try:
        return unquote(expand(value))
    except ValueError:
        return unquote(value)


def read_credentials(path: Path) -> dict[str, str]:
    """The variables of a file of lines `NAME=value`, which nobody else may read.

    Raises:
        ValueError: no such file, one that others may read, or a line that sets no variable of MLflow's client.
    """
    try:
        mode = path.stat().st_mode
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    if mode & 0o077:
        raise ValueError(f"others may read it (mode {mode & 0o777:o}): chmod 600 {path}")
    variables = {}
    for number, line in enumerate(lines, 1):
        name, equals, value = (part.strip() for part in line.partition("="))
        if not name or name.startswith("#"):
            continue
        if not equals or name not in VARIABLES:
            raise ValueError(f"line {number}: write NAME=value; names are {', '.join(VARIABLES)}")
        variables[name] = value
    return variables


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _texts(name)
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)
