"""Evaluates on other shards every so many steps."""

from __future__ import annotations

import logging
from typing import ClassVar

from mmscale.assemble import Run
from mmscale.board import add_scalars, open_board
from mmscale.evaluate import EvaluateCommand, evaluation_config, predict_records
from mmscale.hooks import StepInfo, due
from mmscale.objectives_config import DECODING, TaskConfig
from mmscale.patience import best_of, is_out
from mmscale.run_folder import append_line, drop_torn_line, keep_lines_up_to, read_lines
from mmscale.signals import StopRequest
from mmscale.tasks import build_task
from mmscale.tasks.interval import score_records
from mmscale.tasks.together import Together
from mmscale.watchdog import Section
from shards.errors import ConfigError

logger = logging.getLogger(__name__)


def has_lost_patience(run: Run, step: int) -> bool:
    """Whether the evaluations up to a step are so long without a better one that the run ends (all ranks call)."""
    config, metric = run.config.evaluate, run.config.checkpoint.best
    if not config.patience or metric is None:
        return False
    best = None
    if run.world.is_first:
        best = best_of((r for r in read_lines(run.folder.evaluations) if r["step"] <= step), metric)
    best = Together.of(run.world, run.group).tell(best)
    if best is None or not is_out(best, config.patience):
        return False
    logger.info(
        "ends early at step %d: %s was highest at step %d, %.4g, and %d evaluations since were no better (evaluate.patience = %d)",
        *(step, metric, best.step, best.value, best.since, config.patience),
    )
    return True


class EvaluateHook:
    """Scores the run's task, or retrieval in pretraining, with the weights as they are."""

    section: ClassVar[Section] = "evaluate"

    def __init__(self, run: Run, resumed_at: int, stop: StopRequest) -> None:
        settings, task = run.config.evaluate, run.config.task
        if settings.shards is None:
            raise ConfigError("`evaluate.shards` must name the data set to evaluate on, since `evaluate.every` is set; it is null.")
        self.run = run
        self.stop = stop
        task = task or TaskConfig(name="retrieval")
        command = EvaluateCommand(task=task.name, data=settings.shards, **{name: getattr(task, name) for name in DECODING})
        self.config = evaluation_config(run.config, command)
        self.task = build_task(self.config)
        self.board = None
        if run.world.is_first:
            drop_torn_line(run.folder.evaluations)
            keep_lines_up_to(run.folder.evaluations, resumed_at)
            self.board = open_board(run.folder.tensorboard / "evaluate", resumed_at) if run.config.log.tensorboard else None

    def after_step(self, info: StepInfo) -> None:
        """Evaluate when it is due (all ranks call)."""
        settings, run = self.run.config.evaluate, self.run
        # not at a stop in between: it would spend the time that a checkpoint has left, and count as one more without a better result
        if not due(info.step, settings.every, info.step == run.config.train.steps):
            return
        model = run.trainee.model
        model.eval()
        records = predict_records(
            model,
            self.task,
            self.config,
            run.tokenizer,
            samples=settings.samples,
            batch=settings.batch,
            device=run.world.device,
            world=run.world,
            group=run.group,
        )
        model.train()
        if run.world.is_first:
            metrics = score_records(self.task, records)
            append_line(run.folder.evaluations, {"step": info.step} | metrics)
            if self.board is not None:
                add_scalars(self.board, metrics, info.step, f"{self.task.name}/")
            logger.info("step %d  %s", info.step, "  ".join(f"{k} {'null' if v is None else f'{v:.4g}'}" for k, v in metrics.items()))
        if not info.last:
            self.stop.enough = has_lost_patience(run, info.step)

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self.board is not None:
            self.board.close()
