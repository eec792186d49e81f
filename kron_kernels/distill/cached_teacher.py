"""A teacher that keeps what it said of each example on disk, so that it runs in the first epoch only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .hidden_states import Captured
from .losses import LossConfig
from .objectives import Batch, Objective, QuestionAnswering, attention_mask
from .teacher import TeacherOutputs
from .teacher_cache import DTYPES, TeacherCache, fingerprint

_LAYERED = ("queries", "keys", "ffn")


class CachedTeacher(TeacherOutputs):
    """As ``TeacherOutputs``, for batches that carry the ``index`` (B,) of their examples in the data.

    Args:
        model, losses, objective, autocast: as of ``TeacherOutputs``.
        data: rows with ``input_ids``, ``token_type_ids`` and ``length``: all that will be asked about.
        path: the cache's folder. One of another teacher, data, outputs or dtype is refused.
        dtype: "float16", "bfloat16" or "float32", in which the outputs are stored.

    Raises what ``TeacherCache.open`` raises.
    """

    def __init__(
        self,
        model: Any,
        losses: LossConfig,
        objective: Objective,
        autocast: torch.dtype | None,
        *,
        data: Any,
        path: Path,
        dtype: str,
    ) -> None:
        super().__init__(model, losses, objective, autocast)
        config = model.config
        options = losses.capture_options()
        kept = {"queries": options["scores"], "keys": options["scores"], "ffn": options["ffn"]}
        widths: dict[str, int | tuple[int, int]] = {
            name: (config.num_hidden_layers, config.hidden_size) for name, wanted in kept.items() if wanted
        }
        if options["embedding"]:
            widths["embedding"] = config.hidden_size
        example_widths = {}
        if isinstance(objective, QuestionAnswering):
            widths["logits"] = 2
        elif type(objective) is not Objective:
            example_widths["logits"] = config.num_labels
        examples = ([*row["input_ids"], *row["token_type_ids"]] for row in data)
        self._cache = TeacherCache.open(
            path,
            fingerprint(model, examples, f"{autocast} {losses.ffn_at}"),
            data["length"][:],
            widths,
            DTYPES[dtype],
            example_widths=example_widths,
        )

    def __call__(self, arguments: Mapping[str, Tensor], batch: Batch) -> tuple[Captured, Tensor | None]:
        mask = attention_mask(batch)
        found = self._cache.get(batch["index"], mask.shape[1])
        if found is None:
            captured, logits = super().__call__(arguments, batch)
            outputs = {name: torch.stack(getattr(captured, name), 1) for name in _LAYERED if getattr(captured, name)}
            outputs |= {
                name: value
                for name, value in (("embedding", captured.embedding), ("logits", logits))
                if value is not None
            }
            self._cache.put(batch["index"], mask.sum(1), outputs)
            return captured, logits
        device = mask.device
        values = {name: value.to(device, torch.float32) for name, value in found.items()}
        layers = {name: tuple(values[name].unbind(1)) for name in _LAYERED if name in values}
        return Captured(values.get("embedding"), **layers), values.get("logits")

    def close(self) -> None:
        """Wait until the cache is on the disk."""
        self._cache.close()
