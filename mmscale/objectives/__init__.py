"""The terms of the loss, one file each, and `build_objectives`."""

from mmscale.objectives.base import Objective, Term
from mmscale.objectives.build import build_objectives

__all__ = ["Objective", "Term", "build_objectives"]
