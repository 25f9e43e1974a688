"""What the study compares: one sweep for each kind of guidance, and one for each label dropout."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCALES = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
REDUCED = (1.0, 3.0)
STEPS = 25
UNIT, BATCH = 250, 50

INTERVAL = "sigma:0.2:2"
PHI = 0.7
CLASSIFIER = {"classifier": "fashion-mnist"}
DROPOUTS = (0.1, 0.2, 0.5)


@dataclass(frozen=True)
class Arm:
    """name: of its rows in the table. spec: what a job's spec has besides the common part.

    from_cfg: its samples without guidance are cfg's, which are not made twice. less: what its scales are below the others', so
    that equal places in the lists are equal strengths: c on top of the conditional prediction is as s = 1 + c
    (arXiv 2207.12598, section 3.2).
    """

    name: str
    spec: dict[str, Any] = field(default_factory=dict)
    from_cfg: bool = False
    less: float = 0.0

    def scales(self, common: tuple[float, ...]) -> list[float]:
        return [s - self.less for s in common if not (self.from_cfg and s == 1.0)]

    def toml(self, samples: int, scales: tuple[float, ...], data: str, engine: str = "auto") -> str:
        """Its sweep: TOML and JSON agree on text, numbers and lists of them."""
        job = {"checkpoint": "fashion-mnist", "labels": "balanced", "count": samples, "scales": self.scales(scales)}
        job |= {"steps": STEPS, "dtype": "fp32", "engine": engine, "unit_size": UNIT, "batch": BATCH} | self.spec
        lines = [f"{key} = {json.dumps(value)}" for key, value in job.items()]
        return "\n".join([*lines, "", "[eval]", f"reference = {json.dumps(data + ':test')}", 'features = "fashion-cnn"', ""])


KINDS = (
    Arm("CFG"),
    Arm("CFG in an interval", {"interval": INTERVAL}, from_cfg=True),
    Arm("CFG, rescaled", {"rescale": PHI}, from_cfg=True),
    Arm("classifier on null", CLASSIFIER | {"classifier_base": "null"}),
    Arm("classifier on conditional", CLASSIFIER | {"classifier_base": "conditional"}, from_cfg=True, less=1.0),
)
SMALL = tuple(Arm(f"dropout {p:g}", {"checkpoint": str(HERE / "models" / f"dropout-{p:g}.safetensors")}) for p in DROPOUTS)
