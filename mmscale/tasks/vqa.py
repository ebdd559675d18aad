"""Visual question answering over a closed vocabulary of answers: classification whose text is the question."""

from __future__ import annotations

from mmscale.tasks.classification import label_kind

KIND = label_kind("vqa")
