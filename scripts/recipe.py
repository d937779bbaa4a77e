"""Recipes: files of KNOB=value lines, comments after # at a line's start. Shells and Python read them alike: no quoting, no
expansion, a value is the rest of its line.
"""
from __future__ import annotations

import os
import re
from pathlib import Path

LINE = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)")
FOLDER = Path(__file__).resolve().parent / "recipes"


def recipe_path(name: str) -> Path:
    """The file of a recipe, given by path or by its name in scripts/recipes/. Raises ValueError."""
    for path in (Path(name), FOLDER / f"{name}.env"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.env")))
    raise ValueError(f"recipe {name}: no such file, and none of scripts/recipes/ ({known})")


def read_recipe(path: str | os.PathLike[str]) -> dict[str, str]:
    """The knobs of a recipe, as environment variables. Raises ValueError naming the line."""
    knobs: dict[str, str] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if match is None or match[2] != match[2].strip() or match[1] in knobs:
            raise ValueError(f"{path}, line {number}: wanted KNOB=value, each knob once, no blanks around it, got {line!r}")
        knobs[match[1]] = match[2]
    return knobs
