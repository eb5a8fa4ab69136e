"""Data sets and base checkpoints by their names on the Hugging Face Hub.

hf://OWNER/NAME                                     a model
hf://datasets/OWNER/NAME@REVISION                   a data set at a branch, tag or commit
hf://datasets/OWNER/NAME/FOLDER/IN/IT               one of several in a repository
"""

from __future__ import annotations

import re
from pathlib import Path

# `pathlib` makes one slash of two.
_SCHEME = re.compile("hf:/+")
_NAME = re.compile(r"(datasets/)?(\w[\w.-]*(?:/\w[\w.-]*)?)(?:@([\w.-]+))?((?:/\w[\w.-]*)*)/?")


class HubError(ValueError):
    """A repository that cannot be had: its name, why, and what to do."""


def local_copy(location: str | Path) -> str:
    """A path as it is, or a copy of the repository that it names, in the Hub's own cache (`HF_HOME`).

    What the cache has of a revision is not fetched again; with `HF_HUB_OFFLINE=1` nothing is. A private repository is
    read with the token that `hf auth login` keeps, or `HF_TOKEN`.

    Raises:
        HubError: no name of a repository, no such repository or revision, or no network and no copy.
    """
    scheme = _SCHEME.match(str(location))
    if scheme is None:
        return str(location)
    location = "hf://" + str(location)[scheme.end() :]
    match = _NAME.fullmatch(location, len("hf://"))
    if match is None:
        raise HubError(f"{location}: write it as hf://datasets/OWNER/NAME or hf://OWNER/NAME, @REVISION if need be")
    kind, name, revision, folder = "dataset" if match[1] else "model", match[2], match[3], match[4].strip("/")
    # Here, so that paths cost no import of a client for the network.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        patterns = [f"{folder}/*"] if folder else None
        root = Path(snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=patterns))
        if (root / folder).is_dir():
            return str(root / folder)
        message = f"the {kind} has no folder {folder!r}"
    # First: it is a `RepositoryNotFoundError` too.
    except GatedRepoError:
        message = "its owner must grant access; ask on its page, then set HF_TOKEN"
    except RepositoryNotFoundError:
        message = f"the Hub has no such {kind}, or it is private; check the name, or set HF_TOKEN"
    except RevisionNotFoundError:
        message = f"the {kind} has no revision {revision!r}; name a branch, tag or commit of it"
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            message = "HF_HUB_OFFLINE is set and the cache has no copy; fetch it once with the network, or give a path"
        else:
            message = f"the Hub cannot be reached and the cache has no copy ({_first_line(error)}); give a path"
    except (HfHubHTTPError, OSError, ValueError) as error:
        message = f"cannot be fetched ({_first_line(error)})"
    raise HubError(f"{location}: {message}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
