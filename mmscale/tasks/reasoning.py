"""Reasoning about several images: classification of a sentence and a pair, as in NLVR2, with consistency. Source: Suhr et al. 2019, 4.

The images of a sample are numbered pictures (`KEY.000.jpg`, `KEY.001.jpg`), which the video modality reads as frames: with one frame a
tubelet each image has patches of its own, and its place in time says whether it is the left or the right one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmscale.tasks.classification import Classification, label_kind
from mmscale.tasks.ranking import GROUP
from mmscale.tasks.task import Metrics, Record


class Reasoning(Classification):
    """The `label` head over sentence and images."""

    def kept_of(self, fields: dict[str, Any]) -> Record:
        """Records have `group` where the samples do."""
        return {GROUP: str(fields[GROUP])} if fields.get(GROUP) is not None else {}

    def score(self, records: Sequence[Record]) -> Metrics:
        """As `Classification`, and consistency: the share of groups all of whose samples are right."""
        right: dict[object, bool] = {}
        for record in records:
            group = record.get(GROUP, ("alone", record["position"]))
            right[group] = right.get(group, True) and record["label"] == record["prediction"]
        return {**super().score(records), "consistency": sum(right.values()) / len(right), "groups": float(len(right))}


KIND = label_kind("reasoning", Reasoning)
