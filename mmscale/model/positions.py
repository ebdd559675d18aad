"""Where tokens are: rotary embedding over (time, height, width), and learned tables stretched to other grids.

Shape letters: T tokens, H heads, K width of a head, F = K / 2 frequencies, D hidden size, G side of a table, P = G * G cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmscale.model.attention import Plan
from mmscale.model.configuration import ExpertShape, MMScaleConfig

AXES = 3


@dataclass(frozen=True, slots=True)
class Rotation:
    """Angles of the tokens of a buffer. Source: Su et al. 2021 (RoFormer), equation 34."""

    cos_T1F: Tensor
    sin_T1F: Tensor

    def turn(self, x_THK: Tensor) -> Tensor:
        """Rotate each pair (i, i + F) of a head's numbers by its angle, in fp32."""
        first, second = x_THK.float().chunk(2, dim=-1)
        turned = torch.cat([first * self.cos_T1F - second * self.sin_T1F, second * self.cos_T1F + first * self.sin_T1F], dim=-1)
        return turned.to(x_THK.dtype)


def rotation(coordinates_T3: Tensor, head_size: int, base: float) -> Rotation:
    """Angles at (time, height, width). Frequency i belongs to axis i modulo 3, so that each axis has short and long wavelengths.

    A text token stands at (p, p, p), which is the one-dimensional embedding. Moving all tokens along an axis changes no attention.

    Source: Wang et al. 2024 (Qwen2-VL), section 2.1, with the axes dealt out in turn; Heo et al. 2024 for images.
    """
    frequencies = head_size // 2
    index_F = torch.arange(frequencies, device=coordinates_T3.device)
    rate_F = base ** (-index_F.double() / frequencies)
    angle_T1F = (coordinates_T3[:, index_F % AXES].double() * rate_F)[:, None]
    return Rotation(angle_T1F.cos().float(), angle_T1F.sin().float())


@dataclass(frozen=True, slots=True)
class RotaryPlan:
    """Attention of another plan between rotated queries and keys."""

    plan: Plan
    rotation: Rotation

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        """As the other plan's, shape (T, H, K)."""
        return self.plan.attend(self.rotation.turn(q_THK), self.rotation.turn(k_THK), v_THK)


def with_positions(plan: Plan, coordinates_T3: Tensor | None, config: MMScaleConfig, shape: ExpertShape) -> Plan:
    """The plan between heads of a shape, rotating where positions are rotary; None: they are not."""
    return plan if coordinates_T3 is None else RotaryPlan(plan, rotation(coordinates_T3, shape.head_size, config.rotary_base))


def text_coordinates(offsets_T: Tensor) -> Tensor:
    """Coordinates of text at these offsets, (T, 3)."""
    return offsets_T[:, None].expand(-1, AXES)


def stretched(table_PD: Tensor, side: int, places_T2: Tensor, sizes_T2: Tensor) -> Tensor:
    """Read a square table of positions at cells of grids of any shape, each grid stretched over the table; (T, D).

    Equal to bilinear interpolation with antialiasing of the table to each grid's shape, and exact for the table's own shape.

    Args:
        table_PD: a square, row after row.
        side: G.
        places_T2: row and column of each token in its grid.
        sizes_T2: rows and columns of that grid.

    Source: Tschannen et al. 2025 (SigLIP 2), section 2.4.2.
    """
    scale_T2 = side / sizes_T2.float()
    centre_T2 = (places_T2 + 0.5) * scale_T2
    cells_G = torch.arange(side, device=table_PD.device, dtype=torch.float32) + 0.5
    weight_T2G = (1 - (cells_G - centre_T2[..., None]).abs() / scale_T2.clamp(min=1)[..., None]).clamp(min=0)
    weight_T2G = weight_T2G / weight_T2G.sum(-1, keepdim=True)
    weight_TP = (weight_T2G[:, 0, :, None] * weight_T2G[:, 1, None]).flatten(1)
    return weight_TP.to(table_PD.dtype) @ table_PD
