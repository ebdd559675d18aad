"""Start the experts from transformers checkpoints, and say what was loaded, left and missing.

A tower started here computes what its checkpoint computes: what the model's configuration can say (norms, activation, epsilon,
leading tokens, pooling) must agree, and is refused by name where it does not. What it cannot say is in the printed report.
A checkpoint's first layers start the lower layers, the following ones that expert's part of the fusion layers.
One file a family: how its tensors are named, and what its configuration means.
"""

from mmscale.model.pretrained.report import LoadReport
from mmscale.model.pretrained.towers import load_towers, model_section

__all__ = ["LoadReport", "load_towers", "model_section"]
