"""The multiway fusion Transformer."""

from mmscale.model.configuration import MMScaleConfig, mmscale_config
from mmscale.model.model import MMScaleModel, register

__all__ = ["MMScaleConfig", "MMScaleModel", "mmscale_config", "register"]
