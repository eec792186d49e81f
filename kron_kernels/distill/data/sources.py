"""Where data comes from: what counts as a path, and data sets from the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets

from .tables import SUFFIXES


def hub_name(argument: str, source: str | os.PathLike[str]) -> str:
    """The source as the name of a data set on the hub; FileNotFoundError where it can only be a path."""
    name = str(source)
    if isinstance(source, os.PathLike) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        looks_like_a_path = True
    else:
        looks_like_a_path = Path(name).suffix in (*SUFFIXES, ".txt", ".gz")
    if looks_like_a_path:
        raise FileNotFoundError(f"{argument}: expected a folder, a file or a data set's name, got {name}")
    return name


def load_hub(argument: str, source: str, configuration: str | None = None, split: str | None = None) -> Any:
    """A data set of the hub, by its name and ``:configuration``, or one split of it.

    Raises OSError, in which ``argument`` names what was asked for, when it is not to be had: offline, unknown, cut off.
    """
    name, _, given = source.partition(":")
    try:
        return datasets.load_dataset(name, given or configuration, split=split)
    # The client of the hub, the one of HTTP and the readers of the formats raise errors of many kinds.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(
            f"{argument}: {source} is neither a local folder or file nor to be had from the hub: {reason}"
        ) from error
