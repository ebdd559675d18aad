"""How the tasks that write texts decode: the settings of a stage or an evaluation, and the prompts of a batch."""

from __future__ import annotations

from dataclasses import dataclass

from mmscale.config import RunConfig
from mmscale.data.batch import Batch
from mmscale.data.tokenize import TextTokenizer
from mmscale.model import MMScaleModel
from mmscale.model.generate import generate
from mmscale.model.search import Sampling, Trie
from mmscale.objectives_config import TaskConfig
from mmscale.tasks.task import texts_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Writing:
    """Decodes a batch."""

    beams: int = 1
    """Hypotheses a sample; 1 is greedy."""
    sampling: Sampling | None = None
    """Draw tokens instead."""
    prompt: str | None = None
    """Field of what each text starts with."""
    max_text_tokens: int = 64
    """Tokens of a prompt and its text, as in training."""

    @classmethod
    def of(cls, config: RunConfig) -> Writing:
        """Take the settings of a stage."""
        task = config.task or TaskConfig(name="captioning")
        drawn = Sampling(temperature=task.temperature, top_k=task.top_k, top_p=task.top_p, seed=config.train.seed)
        return cls(
            beams=task.beams,
            sampling=drawn if task.temperature > 0 else None,
            prompt=config.data.prompt,
            max_text_tokens=config.data.max_text_tokens,
        )

    def write(self, model: MMScaleModel, batch: Batch, tokenizer: TextTokenizer, texts: Trie | None = None) -> dict[int, str]:
        """Write a text to each row that shows something; all ranks call.

        Args:
            model: that writes.
            batch: with the samples' fields.
            tokenizer: the model's.
            texts: what may be written; None for anything.
        """
        rows = batch.perception_rows_N.tolist()
        prompts = None if self.prompt is None else [self._prompt(batch, row, tokenizer) for row in rows]
        found = generate(
            model,
            batch,
            max_new_tokens=model.config.max_text_tokens - 1,
            beams=self.beams,
            prompts=prompts,
            sampling=self.sampling,
            texts=texts,
        )
        return {row: tokenizer.decode(ids) for row, ids in zip(rows, found, strict=True)}

    def _prompt(self, batch: Batch, row: int, tokenizer: TextTokenizer) -> list[int]:
        given = texts_of(batch.fields[row], self.prompt or "")
        return tokenizer.prompt(given[0], self.max_text_tokens) if given else []
