"""Whether a step's update may happen: not where a value is not finite, and not where it is a spike.

Failures are global: the guard judges values that were summed over all processes, so that no process goes its own way.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPIKE_MEMORY = 0.98
"""Decay per step of the mean and variance that a spike is measured against: the last 50 steps or so."""
SPIKE_WARMUP = 20
"""Steps before a spike is looked for, while mean and variance settle."""


class StepGuard:
    """Decides on the device, without making the host wait, whether a step's update may happen.

    Args:
        device: where losses and norms are computed.
        on_nonfinite: "stop": after the first loss or norm that is not finite no later update happens either, until the
            host has noticed and stops; "skip": only that step's update is left out.
        spike_zscore: also leave out updates whose loss or norm lies this many standard deviations above its mean.
    """

    def __init__(self, device: torch.device, on_nonfinite: str, spike_zscore: float | None = None):
        self.sticky = on_nonfinite == "stop"
        self.spike_zscore = spike_zscore
        # [steps counted, mean and variance of the loss, of the norm, whether a non-finite value was met]
        self.state = torch.zeros(6, device=device)

    def veto(self, loss: Tensor, grad_norm: Tensor) -> tuple[Tensor, Tensor]:
        """Judge a step by its loss and gradient norm, scalars equal in all processes.

        Returns:
            Whether the update must not happen, and whether that is for a value that is not finite; 0.0 or 1.0, fp32.
        """
        values = torch.stack([loss.float(), grad_norm.float()])
        nonfinite = (~values.isfinite().all()).float()
        if self.sticky:
            nonfinite = torch.maximum(nonfinite, self.state[5])
            self.state[5] = nonfinite
        if self.spike_zscore is None:
            return nonfinite, nonfinite
        count, means, variances = self.state[0], self.state[1:5:2], self.state[2:5:2]
        deviations = values - means
        spike = (deviations > self.spike_zscore * variances.sqrt()).any() & (count >= SPIKE_WARMUP)
        veto = torch.maximum(nonfinite, spike.float())
        # Exponentially decaying mean and variance, unbiased at the start, of the steps that counted.
        weight = torch.maximum(1 / (count + 1), 1 - torch.full_like(count, SPIKE_MEMORY))
        new_means = means + weight * deviations
        new_variances = (1 - weight) * (variances + weight * deviations.square())
        new_state = torch.cat(
            [(count + 1)[None], torch.stack([new_means, new_variances], dim=1).flatten(), self.state[5:]]
        )
        self.state = torch.where(veto > 0, self.state, new_state)
        return veto, nonfinite
