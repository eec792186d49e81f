"""Check the versions of optional libraries."""

from __future__ import annotations

import importlib.metadata

from packaging.specifiers import SpecifierSet


def check_version(package: str, supported: str) -> None:
    """Raise ImportError where ``package`` is not installed in a version of the range ``supported`` (PEP 440)."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{package}: expected version {supported}, got none: it is not installed") from None
    if not SpecifierSet(supported).contains(version, prereleases=True):
        raise ImportError(f"{package}: expected version {supported}, got {version}")
