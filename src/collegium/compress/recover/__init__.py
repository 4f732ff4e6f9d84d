"""Recovery: a shrunk model learns, for a short while, from the model it was made of."""

from __future__ import annotations

from collegium.compress.recover.losses import Distiller, Targets
from collegium.compress.recover.progressive import Stage, shrink_in_stages, stages
from collegium.compress.recover.run import Recovered, recover
from collegium.compress.recover.teacher import TeacherStore

__all__ = ["Distiller", "Recovered", "Stage", "Targets", "TeacherStore", "recover", "shrink_in_stages", "stages"]
