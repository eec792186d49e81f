"""What a compression came to, as data and as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .. import __version__
from ..convert.kronify import ConversionReport, LayerReport
from ..convert.quantize import QuantizationReport
from .blockwise import WarmStartReport

# Block-wise starts of two presets reached 0.3 to 0.5 (centred cosine) and lost a fifth to a third of an encoder's rank
# correlation on sentence pairs; int8 storage alone stays above 0.99.
CLOSE, USABLE = 0.98, 0.9


@dataclass(frozen=True)
class CompressReport:
    """What was compressed, how, and what it came to; ``print`` shows it as a table that ends in the ``verdict``.

    Operations are those of the linear layers on 128 tokens. ``agreement`` is the centred ``hidden_agreement`` of the
    dense and the compressed model on lines of the text, or without one on random token ids; ``planned`` is the plan's
    ``vector_agreement``.
    """

    source: str
    target: str
    architecture: str
    conversion: ConversionReport
    calibration_lines: int
    calibration_tokens: int
    linear_flops_before: int
    linear_flops_after: int
    seconds: float
    quantization: QuantizationReport | None
    warm_start: str
    blocks: WarmStartReport | None
    agreement: float
    planned: Mapping[str, float] | None = None

    @property
    def verdict(self) -> str:
        """Say in one line how near the model is to the dense one, and what to do next."""
        text = "" if self.calibration_lines else " on random token ids"
        if self.agreement >= CLOSE:
            found, todo = "close to the dense model", "kron-kernels evaluate on your task"
        else:
            found = "usable after some training" if self.agreement >= USABLE else "not usable yet"
            todo = "kron-kernels distill" if self.calibration_lines else "--calibrate TEXT, then kron-kernels distill"
        return f"agreement with the dense model {self.agreement:.2f}{text}: {found}; next: {todo}"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        converted: dict[str, Any] = {"conversion": self.conversion.to_dict()}
        if self.quantization is not None:
            converted["quantization"] = self.quantization.to_dict()
        if self.blocks is not None:
            converted["blocks"] = self.blocks.to_dict()
        return {"version": 1, "kron_kernels": __version__, **fields, **converted, "verdict": self.verdict}

    def __str__(self) -> str:
        conversion = self.conversion
        roles: dict[str, list[LayerReport]] = {}
        for layer in conversion.layers:
            roles.setdefault(layer.role, []).append(layer)
        lines = [
            f"{'role':<10}{'layers':>7}  {'structure':<40}{'parameters':>24}{'weight error':>14}{'output error':>14}"
        ]
        for role, layers in roles.items():
            before, after = (
                sum(getattr(layer, name) for layer in layers) for name in ("params_before", "params_after")
            )
            errors = "".join(
                _mean([getattr(each, f"{kind}_error") for each in layers]) for kind in ("relative", "weighted")
            )
            structure = _common([layer.structure for layer in layers])
            lines.append(f"{role:<10}{len(layers):>7}  {structure:<40}{f'{before:,} -> {after:,}':>24}{errors}")
        flops = self.linear_flops_before / 1e9, self.linear_flops_after / 1e9
        lines += [
            "",
            f"{self.architecture} in {self.target}: {conversion.params_before:,} -> {conversion.params_after:,} "
            f"parameters ({conversion.compression:.1f}x fewer)",
            f"linear layers on 128 tokens: {flops[0]:.3f} -> {flops[1]:.3f} GFLOP ({flops[0] / flops[1]:.1f}x fewer)",
        ]
        if self.calibration_tokens:
            lines.append(f"data-aware fit on {self.calibration_lines} lines, {self.calibration_tokens:,} tokens")
        if self.planned is not None:
            lines.append(f"planned: {describe(self.planned)}")
        if self.blocks is not None:
            last = self.blocks.blocks[-1]
            errors = f"{last.error_before:.3f} -> {last.error_after:.3f}"
            lines.append(f"block-wise training, {self.blocks.steps} steps a block: error of the last block {errors}")
        if (stored := self.quantization) is not None:
            sizes = f"{stored.bytes_before / 1e6:.2f} -> {stored.bytes_after / 1e6:.2f} MB of weights"
            lines.append(
                f"{stored.weight_dtype} factors: {sizes}, cosine {stored.agreement:.5f} with the factors before"
            )
        return "\n".join([*lines, self.verdict])


def describe(agreement: Mapping[str, float]) -> str:
    """Say how sentence vectors agree with the dense model's before any training."""
    return (
        f"similarities of sentences correlate {agreement['correlation']:.2f} with the dense model's before any "
        f"training, vectors' cosine {agreement['cosine']:.2f}"
    )


def _common(structures: list[str]) -> str:
    """The structure that all layers have, or the range of their ranks."""
    if len(set(structures)) == 1:
        return structures[0]
    ranks = [int(structure.split()[-1]) for structure in structures if structure.startswith("rank ")]
    return f"rank {min(ranks)} to {max(ranks)}" if len(ranks) == len(structures) else "several"


def _mean(errors: Iterable[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{sum(known) / len(known):>14.3f}" if known else f"{'-':>14}"
