"""`Device`: a second processor in the words of its data sheet, and the times that follow for a schedule.

Legend: n tokens of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from collegium.errors import ConfigError
from collegium.named import parse_settings, settled
from collegium.offload.cost import CostModel
from collegium.offload.predictors.base import FEW
from collegium.offload.schedule.hybrimoe import Hybrid

__all__ = ["Device", "find_device"]


@dataclass(frozen=True)
class Device:
    """A processor with memory of its own. An expert takes ``seconds``, and each of its tokens two operations a weight.

    Attributes:
        transfer: GB/s (1e9 bytes) of the link to its memory.
        seconds: that an expert takes there however many tokens it has, such as the time to stream its weights.
        gflops: 1e9 operations a second; None where tokens cost nothing beyond `seconds`.
        latency: seconds that moving an expert takes beyond its bytes.

    Raises:
        ConfigError: a number cannot be, or it is not said how fast it computes.
    """

    transfer: float
    seconds: float | None = None
    gflops: float | None = None
    latency: float = 0.0

    def __post_init__(self) -> None:
        for name, zero in (("transfer", False), ("gflops", False), ("seconds", True), ("latency", True)):
            value = getattr(self, name)
            if value is not None and not (np.isfinite(value) and (value > 0 or (zero and value == 0))):
                raise ConfigError(f"{name} must be a number {'of at least' if zero else 'above'} 0, not {value}")
        if self.seconds is None and self.gflops is None:
            raise ConfigError("how fast does it compute? give seconds (of an expert), gflops, or both")

    def beside(self, cost: CostModel, bits: int, nbytes: int) -> Hybrid:
        """The times of this device as the fast processor, and of the machine of a cost model as the slow one.

        The slow one's are the line through the cost model's times for 1 token and for as many as a pass of decoding
        may have, and once a step what calling its experts takes.

        Args:
            bits, nbytes: of one expert.
        """
        one, many = (cost.expert_seconds(rows, bits, nbytes) for rows in (1, FEW))
        token = max(0.0, many - one) / (FEW - 1)
        weights = 8 * nbytes / bits
        return Hybrid(
            fast=self.seconds or 0.0,
            fast_token=0.0 if self.gflops is None else 2 * weights / (self.gflops * 1e9),
            slow=token,
            slow_expert=max(0.0, one - token),
            slow_start=cost.call_seconds,
            transfer=self.latency + nbytes / (self.transfer * 1e9),
        )


def find_device(text: str) -> tuple[str, Device]:
    """``(name, device)`` of ``"name:setting=value,setting=value"``, such as ``"gpu:seconds=0.0004,transfer=12"``; the
    name is for people.

    Raises:
        ConfigError: it is not that, there is no such setting, or a value is not allowed.
    """
    name, _, rest = text.partition(":")
    try:
        if not name.strip():
            raise ConfigError("it has no name")
        return name.strip(), settled(Device, parse_settings(rest))
    except ConfigError as error:
        raise ConfigError(
            f"device {text!r}: {error}; write it as gpu:seconds=0.0004,transfer=12 (seconds an expert, GB/s of the "
            "link) or gpu:gflops=9000,transfer=12"
        ) from error
