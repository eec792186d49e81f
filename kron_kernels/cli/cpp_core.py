"""Where the C++ core lies, for projects that use it without torch: headers, library and CMake package."""

from __future__ import annotations

from pathlib import Path

from ..backends import build_info

_PACKAGE = Path(__file__).resolve().parent.parent
_CMAKE = Path("share/cmake/kron_kernels")


def cmake_dir() -> Path:
    """Folder to give to CMake as ``kron_kernels_DIR``: with it ``find_package(kron_kernels)`` finds this package.

    Raises RuntimeError where the package was installed without its compiled part.
    """
    folder = _PACKAGE / _CMAKE
    if not (folder / "kron_kernelsConfig.cmake").is_file():
        reason = build_info().get("missing", "the package was not built")
        raise RuntimeError(f"{folder} is absent: {reason}")
    return folder
