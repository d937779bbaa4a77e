"""The maps of scripts/sensitivity.py as a plan reads them: EXPORT_ALLOCATE=sensitivity, SENSITIVITY_MAP."""
from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from export import ArtifactError, matrices, require


@dataclass(frozen=True)
class SensitivityMap:
    """Measured by scripts/sensitivity.py: for each matrix the squared relative errors of its quantisation at several widths,
    and the loss increase of each in nats a token.
    """
    points: Mapping[str, tuple[tuple[float, float], ...]]      # ascending by error

    def loss(self, name: str, relative: float) -> float:
        """Interpolated on logarithmic axes; beyond the ends in proportion to the squared error."""
        errors, nats = (np.array(side) for side in zip(*self.points[name], strict=True))
        at = float(np.clip(relative, errors[0], errors[-1]))
        value = math.exp(np.interp(math.log(max(at, 1e-300)), np.log(errors), np.log(nats)))
        return value * relative / at if at else 0.0


def read_sensitivity(path: str | os.PathLike[str], shapes: Mapping[str, Sequence[int]]) -> SensitivityMap:
    """A map of a model with these tensors, measured on training tokens. Raises ArtifactError."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        split, points = found["split"], {}
        for name, entry in found["tensors"].items():
            pairs = sorted((float(p["relative_error"]), float(p["nats"])) for p in entry["points"])
            if not np.isfinite(pairs).all():
                raise ValueError(f"{name} has a point that is not finite")
            line = float(np.median([nats / error for error, nats in pairs if error > 0 and nats > 0] or [0.0]))
            # Fine quantisation can help by chance: points below a tenth of the line through the origin are put there.
            points[name] = tuple((e, max(nats, 0.1 * line * e, 1e-300)) for e, nats in pairs if e > 0)
        measured = {name: tuple(entry["shape"]) for name, entry in found["tensors"].items()}
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as fault:
        reason = " ".join(f"{type(fault).__name__} ({fault})".split())[:200]
        raise ArtifactError("sensitivity map", None, reason, "a JSON file of scripts/sensitivity.py") from None
    require(split == "train", "sensitivity map", None, f"one measured on the {split} split",
            "one measured on training tokens (--split train): validation data must not shape an artifact")
    wanted = matrices(shapes)
    for name in sorted(wanted.keys() | measured.keys()):
        require(measured.get(name) == wanted.get(name) and bool(points.get(name)), f"sensitivity map, tensor {name}", None,
                measured.get(name, "nothing"), f"{wanted.get(name, 'nothing')}: the map is of another model")
    return SensitivityMap(points)
