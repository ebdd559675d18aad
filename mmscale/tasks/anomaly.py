"""Anomaly scores: how badly a model that was trained on the normal alone guesses what was hidden of a sample.

Patches are hidden in four turns, so that each is guessed equally often, from the rest of its image, clip or sound. A model that knows
only the normal guesses it better than anything else. Sources: He et al. 2022 (MAE), the loss; Schwartz et al. 2024 (MAEDAY), section 3,
several masks and their mean error as the score.

Shape letters: N records, P patches, R hidden patches, T steps of time, M samples of a batch.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmscale.config import RunConfig
from mmscale.data.batch import Batch
from mmscale.data.keyed import Purpose, purpose_of, uniform
from mmscale.data.labels import number_of
from mmscale.data.tokenize import TextTokenizer
from mmscale.model import MMScaleModel
from mmscale.model.percepts import Items
from mmscale.model.sequences import Wanted
from mmscale.objectives.masked_image import MaskedImage, Target, patch_errors
from mmscale.tasks.curves import weighted_auroc
from mmscale.tasks.evaluated import Evaluated
from mmscale.tasks.kinds import TaskKind
from mmscale.tasks.task import Metrics, Record, Resampler, record_of
from shards.errors import ConfigError

logger = logging.getLogger(__name__)
TURNS = 4
"""In each of them some quarters of the patches are hidden: as many as come closest to `objectives.masked_image.mask`."""
Sums = dict[tuple[str, int], list[float]]
"""Of a sample, by modality and step of time: the sum of its patches' errors, and how many there are."""
RECALL = 0.95
"""Part of the anomalies that are to be found where false alarms are counted."""


class Anomaly:
    """Scores every sample that shows or sounds like something; needs no head and, but for its metrics, no label.

    Args:
        label: json field that says whether a sample is an anomaly; None where nobody knows.
        mask: part of the patches that training hid.
        target: what it guessed.
    """

    name = "anomaly"
    main_metric = "auroc"

    def __init__(self, label: str | None, mask: float, target: Target) -> None:
        self.label = label
        self.hidden = min(TURNS - 1, max(1, round(TURNS * mask)))
        self.target = target

    def predict(self, model: MMScaleModel, batch: Batch, tokenizer: TextTokenizer) -> list[Record]:
        """Score by the mean error of all patches of all items of the sample.

        `by_time` has it for each step of time, by modality, where there are several.
        """
        sums: dict[int, Sums] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
        for turn in range(TURNS):
            hidden = self._hide(batch.on_host, turn).to(batch.positions_M.device)
            state = model.run(hidden, Wanted(masked_image=True, features=self.target == "features"))
            items = model.lay_out(hidden, masked=True).items
            for of, pair in zip(items, state.patches, strict=True):
                rows, times, errors = (values.tolist() for values in (*_places(of), patch_errors(self.target, *pair).double()))
                for row, time, error in zip(rows, times, errors, strict=True):
                    total = sums[row][of.name, time]
                    total[0] += error
                    total[1] += 1
        return [record_of(batch, row, **self._scored(batch, row, sums[row])) for row in sorted(sums)]

    def score(self, records: Sequence[Record]) -> Metrics:
        """AUROC, average precision, false alarms where 95 % of the anomalies are found; mean scores of normal samples and of anomalies."""
        from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

        known = [r for r in records if r["anomaly"] is not None]
        target_N, score_N = np.array([r["anomaly"] for r in known], dtype=bool), np.array([r["score"] for r in known], dtype=float)
        found: dict[str, float | None] = dict.fromkeys(("auroc", "average_precision", f"false_alarms_at_{100 * RECALL:.0f}"))
        if self._defined(target_N, score_N):
            alarms, hits, _ = roc_curve(target_N, score_N)
            values = roc_auc_score(target_N, score_N), average_precision_score(target_N, score_N), alarms[np.argmax(hits >= RECALL)]
            found = {name: float(value) for name, value in zip(found, values, strict=True)}
        means = {"normal_score": score_N[~target_N], "anomaly_score": score_N[target_N]}
        counts = {"anomalies": float(target_N.sum()), "samples": float(len(records))}
        return found | {name: float(values.mean()) if len(values) else None for name, values in means.items()} | counts

    def resampler(self, records: Sequence[Record]) -> Resampler:
        """AUROC of resamples."""
        known_N = np.array([r["anomaly"] is not None for r in records])
        target_N = np.array([bool(r["anomaly"]) for r in records])[known_N]
        score_N = np.array([r["score"] for r in records], dtype=float)[known_N]
        return lambda counts_RN: weighted_auroc(target_N, score_N, counts_RN[:, known_N])

    def _hide(self, batch: Batch, turn: int) -> Batch:
        """Hide the quarters whose turn it is; which patch is of which quarter is drawn by the sample's position."""
        positions_M = batch.positions_M.numpy()
        image_NP = self._mask("image", positions_M[batch.image_rows_N.numpy()], batch.patch_mask_NP.shape[1], turn)
        streams = {}
        for name, stream in batch.streams.items():
            lengths = stream.cu_seqlens_S1.diff().tolist()
            rows = [positions_M[row : row + 1] for row in stream.rows_S.tolist()]
            masks = [self._mask(name, row, length, turn)[0] for row, length in zip(rows, lengths, strict=True)]
            streams[name] = replace(stream, mask_T=torch.cat([*masks, stream.mask_T[:0]]))
        return replace(batch, patch_mask_NP=image_NP, streams=streams)

    def _mask(self, name: str, positions_S: NDArray[np.int64], patches: int, turn: int) -> torch.Tensor:
        draws_SP = uniform(0, positions_S, purpose_of(Purpose.PATCH_MASK, name), patches)
        quarter_SP = draws_SP.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable") % TURNS
        return torch.from_numpy((quarter_SP - turn) % TURNS < self.hidden)

    def _scored(self, batch: Batch, row: int, sums: Sums) -> dict[str, Any]:
        total, count = (sum(pair[i] for pair in sums.values()) for i in (0, 1))
        by_time: dict[str, list[float]] = defaultdict(list)
        for name, time in sorted(sums):
            by_time[name].append(sums[name, time][0] / sums[name, time][1])
        several = {name: means for name, means in by_time.items() if len(means) > 1}
        found = {"anomaly": self._label_of(batch, row), "score": total / count}
        return found | ({"by_time": several} if several else {})

    def _label_of(self, batch: Batch, row: int) -> bool | None:
        if self.label is None:
            return None
        value = batch.fields[row].get(self.label)
        value = {"true": True, "false": False}.get(value.strip().lower(), value) if isinstance(value, str) else value
        number = float(value) if isinstance(value, bool) else number_of(value)
        if value is None or number in (0, 1):
            return None if value is None else bool(number)
        raise ConfigError(
            f"`data.label={self.label}` of {batch.keys[row]} is {value!r}, and an anomaly is true or false (1 or 0). Name the field that "
            "says so: `label` of mmscale evaluate, `data.label` of training."
        )

    def _defined(self, target_N: NDArray[np.bool_], score_N: NDArray[np.float64]) -> bool:
        if not np.isfinite(score_N).all():
            why = "the model computes scores that are not finite"
        elif not len(target_N) or target_N.all() or not target_N.any():
            what = "anomalies" if len(target_N) and target_N.all() else "normal"
            why = f"all {len(target_N)} samples are {what}" if len(target_N) else "no sample says whether it is an anomaly"
        else:
            return True
        logger.warning(
            "The metrics auroc, average_precision and false alarms are undefined and reported as null: %s. %s",
            *(why, f"Look at the field {self.label!r}." if self.label else "Name the field that says so with `label=FIELD`."),
        )
        return False


def _places(items: Items) -> tuple[torch.Tensor, torch.Tensor]:
    """The sample's row, and the step of time from 0 on, of each hidden patch; of square images all are at 0."""
    first_S = items.lengths_S.cumsum(0) - items.lengths_S
    token_R = first_S[len(items.rows) + items.hidden_copy_R] + items.hidden_offset_R
    time_R = (items.coordinates_X3[token_R, 0] - 1).clamp(min=0)
    return items.rows[items.copies[items.hidden_copy_R]], time_R


def _draw(found: Evaluated) -> None:
    """Draw how scores are spread, and what scores most and least."""
    from mmscale.pictures import draw_anomalies

    draw_anomalies(found.records, found.dataset, found.out / "anomalies.png")


def _build(config: RunConfig) -> Anomaly:
    return Anomaly(config.data.label, config.objectives.masked_image.mask, config.objectives.masked_image.target)


KIND = TaskKind(
    name="anomaly",
    build=_build,
    objective=lambda task: MaskedImage(weight=task.weight),
    masks=True,
    draw=_draw,
)
