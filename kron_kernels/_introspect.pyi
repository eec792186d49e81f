from typing import Any

from numpy.typing import NDArray

def detected_isa() -> str: ...
def active_isa() -> str: ...
def set_isa_cap(cap: str) -> None: ...
def compiled_isas() -> list[str]: ...
def last_scratch_bytes() -> int: ...
def forward(
    dtype: str,
    x: NDArray[Any],
    a: NDArray[Any],
    b: NDArray[Any],
    bias: NDArray[Any] | None,
    activation: int,
    y: NDArray[Any],
    threads: int = 1,
    reverse: bool = False,
) -> None: ...
def backward(
    dtype: str,
    grad: NDArray[Any],
    x: NDArray[Any],
    a: NDArray[Any],
    b: NDArray[Any],
    dx: NDArray[Any] | None,
    da: NDArray[Any] | None,
    db: NDArray[Any] | None,
    dbias: NDArray[Any] | None,
    threads: int = 1,
    reverse: bool = False,
) -> None: ...
