"""Examples to one ragged batch: which text enters which stream, what is masked, what is drawn. All randomness is keyed by (seed, position).

Shape letters: M samples, N images, S sequences of a stream, T tokens of a stream, L longest sequence, P patches, G group size, H side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmscale.augment_config import AugmentConfig
from mmscale.config import RunConfig
from mmscale.data.augment import Augmentation, apply, draws_for, follows, is_active, rewrite
from mmscale.data.batch import IGNORE, Batch, Mixing, PatchStream, TextStream
from mmscale.data.example import Example
from mmscale.data.keyed import Purpose, uniform
from mmscale.data.mixing import mix
from mmscale.data.patches import BYTES_A_PATCH, BYTES_AN_ITEM, Chooser, gather_stream
from mmscale.data.plan import StreamPlan
from mmscale.data.targets import Facts, Follow, Target
from mmscale.data.tokenize import TextTokenizer
from mmscale.modalities.modality import Change, Modality, build_modalities
from mmscale.tasks.kinds import kind_of_stage

_CAPTION, _TEXT, _FUSE, _IMAGE = range(4)
"""Columns of the Purpose.CHOICE draws: which caption; whether the text stream, fusion and image masking take the sample."""
Encoded = list[tuple[int, list[int]]]
"""(row, ids) of each sample that has a text."""
BYTES_OF_MIXING = 12
"""Of a sample: its partner's row and its own share."""
_REPLACE_BY_MASK, _REPLACE_BY_RANDOM = 0.8, 0.9
"""BERT's 80 / 10 / 10: mask token, random token, left as it is (Devlin et al. 2019)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Collator:
    """Turns examples into a `Batch`. Picklable; the same examples give the same batch anywhere."""

    tokenizer: TextTokenizer
    """Text to ids."""
    plan: StreamPlan
    """What enters the batch."""
    seed: int
    """The run's seed."""
    image_size: int
    """Side of the images in pixels."""
    patch_size: int
    """Side of a patch in pixels."""
    max_text_tokens: int
    """Longest sequence."""
    pad_captions: int = 0
    """Tokens that captions are filled up to."""
    target: Target | None = None
    """What the task's targets are; None for no task with a head."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentation; its default changes nothing."""
    modalities: dict[str, Modality] = field(default_factory=dict)
    """What is read besides square images, in the order of a sample's items."""
    training: bool = True
    """False: the first caption instead of a drawn one, and the samples' fields go along."""
    ordinary_ids: NDArray[np.int64] = field(init=False, repr=False, compare=False)
    """Ids that a masked token may be replaced by."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ordinary_ids", self.tokenizer.ordinary_ids)

    @classmethod
    def from_config(
        cls, config: RunConfig, tokenizer: TextTokenizer, training: bool = True, facts: Facts | None = None
    ) -> Collator:
        """Build what a stage's configuration asks for.

        Args:
            config: the stage.
            tokenizer: its tokenizer.
            training: False gives unmasked, unaugmented batches of every sample, with their fields.
            facts: what the task took from its training shards; None takes `data.labels`.

        Raises:
            ConfigError: a combination that cannot work.
        """
        kind = kind_of_stage(config)
        if facts is None:
            facts = Facts(labels=None if config.data.labels is None else tuple(config.data.labels))
        plan = StreamPlan.from_config(config, training=training, has_mask=tokenizer.mask is not None)
        return cls(
            tokenizer=tokenizer,
            plan=plan,
            seed=config.train.seed,
            image_size=config.model.image_size,
            patch_size=config.model.patch_size,
            max_text_tokens=config.data.max_text_tokens,
            pad_captions=config.data.pad_captions,
            target=kind.target(config, facts) if kind is not None and kind.target is not None else None,
            augment=config.data.augment if training else AugmentConfig(),
            modalities=build_modalities(config.model) if config.data.image else {},
            training=training,
        )

    @property
    def takes_squares(self) -> bool:
        """Whether images go in as squares of one size."""
        return self.plan.image and "image" not in self.modalities

    @property
    def patches(self) -> int:
        """P, the patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Augment, stack and assemble examples that were read one by one, as a DataLoader's `collate_fn`."""
        pixels_MHHC = np.empty((len(examples), self.image_size, self.image_size, 3), np.uint8)
        draws = self.augment_draws([e.position for e in examples])
        for i, example in enumerate(examples):
            if example.image is not None:
                pixels_MHHC[i] = example.image
                self.augment_into(pixels_MHHC[i], draws[i])
        regions = {name: np.empty((len(examples) * m.max_patches, m.values), m.dtype) for name, m in self.modalities.items()}
        return self.assemble(examples, pixels_MHHC, regions)

    def augment_draws(self, positions: Sequence[int]) -> NDArray[np.float64]:
        """Draw the augmentation of a micro-batch: (M, draws), or (M, 0) where nothing is augmented."""
        where = np.asarray(positions, dtype=np.int64)
        return draws_for(self.seed, where) if is_active(self.augment) else np.empty((len(where), 0))

    def augment_into(self, image_HHC: NDArray[np.uint8], draws: NDArray[np.float64]) -> None:
        """Augment one decoded image in its place. Threads may call this at once."""
        if draws.size:
            image_HHC[...] = apply(image_HHC, self.augment, draws)

    def change(self, draws: NDArray[np.float64]) -> Change:
        """What augmentation does to the parts of a sample. Threads may call this at once."""
        return Augmentation(self.augment, draws) if draws.size else Change()

    def assemble(
        self, examples: Sequence[Example], pixels_MHHC: NDArray[np.uint8], regions: Mapping[str, NDArray[Any]] | None = None
    ) -> Batch:
        """Build the batch of examples whose images, augmented, lie in the rows of one array.

        Args:
            examples: M of them.
            pixels_MHHC: (M, H, H, 3) uint8. Row i is the image of example i where it has one; images are moved together in place, and
                the batch's pixels are a (channels-last) view of it.
            regions: memory of each modality's patches, (M * max_patches, values), where there are modalities; items that lie in it are moved together, and the
                streams' values are views of it.
        """
        positions_M = np.array([e.position for e in examples], dtype=np.int64)
        choice_M4 = uniform(self.seed, positions_M, Purpose.CHOICE, 4)
        follow = self._follow(examples, positions_M)
        targets = {} if self.target is None else {self.target.name: self.target.of(examples, follow)}
        mixing = self._mix(examples, targets, pixels_MHHC)
        image_rows_N = [i for i, e in enumerate(examples) if e.image is not None] if self.takes_squares else []
        for target, row in enumerate(image_rows_N):
            if target != row:
                pixels_MHHC[target] = pixels_MHHC[row]
        kept_NK = self._kept(positions_M[image_rows_N])
        encoded = {name: self._encode(examples, name, choice_M4, follow) for name in {self.plan.caption, self.plan.text}}
        return Batch(
            positions_M=torch.from_numpy(positions_M),
            weights_M=torch.tensor([e.weight for e in examples], dtype=torch.float32),
            keys=[e.key for e in examples],
            pixels_NCHW=torch.from_numpy(pixels_MHHC[: len(image_rows_N)]).permute(0, 3, 1, 2),
            image_rows_N=torch.tensor(image_rows_N, dtype=torch.int64),
            patch_mask_NP=torch.from_numpy(
                self._chooser("image").hidden(
                    positions_M[image_rows_N],
                    choice_M4[image_rows_N, _IMAGE] < self.plan.patch_mask_fraction,
                    self.patches if kept_NK is None else kept_NK.shape[1],
                )
            ),
            kept_NK=None if kept_NK is None else torch.from_numpy(kept_NK),
            streams=self._streams(examples, positions_M, choice_M4, regions or {}),
            caption=self._caption_stream(encoded[self.plan.caption], self._prompts(examples, follow), choice_M4),
            text=self._text_stream(encoded[self.plan.text], positions_M, choice_M4),
            gumbel_MG=torch.from_numpy(self._gumbel(positions_M)),
            targets=targets,
            mixing=mixing,
            fields=[] if self.training else [e.fields | {"captions": e.captions} for e in examples],
        )

    def batch_bytes(self, samples: int) -> int:
        """Bound the bytes of a batch's tensors, its pixels left out."""
        stream = 16 * self.max_text_tokens + 16
        sample = 2 * stream + 32 + self.patches + 4 * self._group(samples) + (0 if self.target is None else self.target.sample_bytes)
        sample += 8 * self.patches if "image" in self.plan.keep else 0
        sample += sum(BYTES_A_PATCH * m.max_patches + BYTES_AN_ITEM for m in self.modalities.values())
        sample += BYTES_OF_MIXING if self.augment.mixes else 0
        return samples * sample + 4096 * (1 + len(self.modalities))

    def _mix(self, examples: Sequence[Example], targets: Mapping[str, Tensor], pixels_MHHC: NDArray[np.uint8]) -> Mixing | None:
        if self.augment.mixes is None:
            return None
        target_ML = targets[self.target.name].reshape(len(examples), -1) if self.target is not None else torch.empty(len(examples), 0)
        known_M = (target_ML != IGNORE).all(1).numpy()
        squares = pixels_MHHC if self.takes_squares else None
        return mix(examples, known_M, squares, self.modalities, seed=self.seed, config=self.augment)

    def _chooser(self, name: str) -> Chooser:
        return Chooser(name, self.seed, self.plan.keep.get(name), self.plan.patch_mask)

    def _kept(self, positions_N: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Patches kept of each square image. Positions of a step share their part; of others the first one's counts."""
        chooser = self._chooser("image")
        if not len(positions_N) or chooser.keeps_all(int(positions_N[0])):
            return None
        return chooser.kept(positions_N, self.patches)

    def _streams(
        self,
        examples: Sequence[Example],
        positions_M: NDArray[np.int64],
        choice_M4: NDArray[np.float64],
        regions: Mapping[str, NDArray[Any]],
    ) -> dict[str, PatchStream]:
        chosen_M = choice_M4[:, _IMAGE] < self.plan.patch_mask_fraction
        return {n: gather_stream(self._chooser(n), examples, positions_M, chosen_M, regions[n]) for n in self.modalities}

    def _follow(self, examples: Sequence[Example], positions_M: NDArray[np.int64]) -> Follow:
        """How words follow the augmentation of each sample's image."""
        if not follows(self.augment):
            return lambda row, text: text
        draws = self.augment_draws(positions_M.tolist())
        return lambda row, text: rewrite(text, self.augment, draws[row]) if _is_seen(examples[row]) else text

    def _encode(self, examples: Sequence[Example], name: str | None, choice_M4: NDArray[np.float64], follow: Follow) -> Encoded:
        """Encode one text of each sample that has the field, the same one for both streams."""
        encoded = []
        for row, example in enumerate(examples):
            texts = [] if name is None else example.texts(name)
            if texts:
                drawn = int(choice_M4[row, _CAPTION] * len(texts)) if self.training else 0
                encoded.append((row, self.tokenizer.encode(follow(row, texts[drawn]), self.max_text_tokens)))
        return encoded

    def _prompts(self, examples: Sequence[Example], follow: Follow) -> dict[int, list[int]]:
        """What goes before the captions, by row."""
        if self.plan.prompt is None:
            return {}
        texts = {row: example.texts(self.plan.prompt) for row, example in enumerate(examples)}
        return {row: self.tokenizer.prompt(follow(row, found[0]), self.max_text_tokens) for row, found in texts.items() if found}

    def _caption_stream(self, encoded: Encoded, prompts: dict[int, list[int]], choice_M4: NDArray[np.float64]) -> TextStream:
        pad, end = [self.tokenizer.pad], self.tokenizer.end
        if prompts:
            encoded = [(row, _after(prompts.get(row, []), ids, self.max_text_tokens, end)) for row, ids in encoded]
        ids_T, cu_seqlens_S1, rows_S = _concatenate([(row, ids + pad * (self.pad_captions - len(ids))) for row, ids in encoded])
        labels_T = np.full_like(ids_T, IGNORE)
        labels_T[:-1] = ids_T[1:]
        labels_T[cu_seqlens_S1[1:] - 1] = IGNORE
        for start, row in zip(cu_seqlens_S1[:-1].tolist(), rows_S.tolist() if prompts else (), strict=False):
            labels_T[start : start + len(prompts.get(row, ()))] = IGNORE
        fuse_S = choice_M4[rows_S, _FUSE] < self.plan.caption_fuse
        return _stream(ids_T, cu_seqlens_S1, rows_S, labels_T, fuse_S)

    def _text_stream(self, encoded: Encoded, positions_M: NDArray[np.int64], choice_M4: NDArray[np.float64]) -> TextStream:
        takes_part_M = choice_M4[:, _TEXT] < self.plan.text_fraction
        sequences = [(row, ids) for row, ids in encoded if takes_part_M[row]]
        ids_T, cu_seqlens_S1, rows_S = _concatenate(sequences)
        masked_S = choice_M4[rows_S, _TEXT] < self.plan.token_mask_fraction
        self._mask_words(ids_T, cu_seqlens_S1, positions_M[rows_S])
        labels_T = self._mask_tokens(ids_T, cu_seqlens_S1, positions_M[rows_S], masked_S)
        return _stream(ids_T, cu_seqlens_S1, rows_S, labels_T, np.ones(len(rows_S), dtype=bool))

    def _mask_words(self, ids_T: NDArray[np.int64], cu_seqlens_S1: NDArray[np.int32], positions_S: NDArray[np.int64]) -> None:
        """Put [MASK] in the place of some tokens, begin and end left out; nobody has to guess them."""
        if self.tokenizer.mask is None or not self.augment.word_mask or not len(ids_T):
            return
        lengths_S = np.diff(cu_seqlens_S1)
        place_L = np.arange(int(lengths_S.max()))
        draws_SL = uniform(self.seed, positions_S, Purpose.WORD_MASK, len(place_L))
        inside_SL = place_L < lengths_S[:, None]
        hidden_SL = (draws_SL < self.augment.word_mask) & (place_L > 0) & (place_L < lengths_S[:, None] - 1)
        ids_T[hidden_SL[inside_SL]] = self.tokenizer.mask

    def _mask_tokens(
        self, ids_T: NDArray[np.int64], cu_seqlens_S1: NDArray[np.int32], positions_S: NDArray[np.int64], masked_S: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """Hide tokens in place and return the labels: the hidden ids, IGNORE elsewhere."""
        labels_T = np.full_like(ids_T, IGNORE)
        if self.tokenizer.mask is None or not self.plan.token_mask or not masked_S.any():
            return labels_T
        lengths_S = np.diff(cu_seqlens_S1)
        longest = int(lengths_S.max())
        draws_SL4 = uniform(self.seed, positions_S, Purpose.TOKEN_MASK, 4 * longest).reshape(-1, longest, 4)
        place_L = np.arange(longest)
        inside_SL = place_L < lengths_S[:, None]
        may_hide_SL = inside_SL & (place_L > 0) & (place_L < lengths_S[:, None] - 1) & masked_S[:, None]
        draws_T4, may_hide_T = draws_SL4[inside_SL], may_hide_SL[inside_SL]
        hidden_T = may_hide_T & (draws_T4[:, 0] < self.plan.token_mask)
        labels_T[hidden_T] = ids_T[hidden_T]
        kind_T = draws_T4[:, 1]
        ids_T[hidden_T & (kind_T < _REPLACE_BY_MASK)] = self.tokenizer.mask
        random_T = hidden_T & (kind_T >= _REPLACE_BY_MASK) & (kind_T < _REPLACE_BY_RANDOM)
        ids_T[random_T] = self.ordinary_ids[(draws_T4[random_T, 2] * len(self.ordinary_ids)).astype(np.int64)]
        return labels_T

    def _gumbel(self, positions_M: NDArray[np.int64]) -> NDArray[np.float32]:
        draws_MG = uniform(self.seed, positions_M, Purpose.GUMBEL, self._group(len(positions_M)))
        return (-np.log(-np.log(draws_MG))).astype(np.float32)

    def _group(self, samples: int) -> int:
        return (self.plan.matching_group or samples) if self.plan.matching else 0


def _after(prompt: list[int], ids: list[int], most: int, end: int) -> list[int]:
    """Put a prompt behind the begin token of a text, which is cut to the room that is left."""
    joined = ids[:1] + prompt + ids[1:]
    return joined if len(joined) <= most else [*joined[: most - 1], end]


def _is_seen(example: Example) -> bool:
    """Whether it has a picture that augmentation changes."""
    return example.image is not None or any(patches.values_PC.dtype == np.uint8 for patches in example.items.values())


def _concatenate(sequences: Encoded) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
    """Concatenate (row, ids) pairs: ids (T,), offsets (S + 1,), rows (S,)."""
    ids_T = np.array([i for _, ids in sequences for i in ids], dtype=np.int64)
    cu_seqlens_S1 = np.zeros(len(sequences) + 1, dtype=np.int32)
    np.cumsum([len(ids) for _, ids in sequences], out=cu_seqlens_S1[1:])
    return ids_T, cu_seqlens_S1, np.array([row for row, _ in sequences], dtype=np.int64)


def _stream(*arrays: NDArray[Any]) -> TextStream:
    ids_T, cu_seqlens_S1, rows_S, labels_T, fuse_S = map(torch.from_numpy, arrays)
    return TextStream(ids_T=ids_T, cu_seqlens_S1=cu_seqlens_S1, rows_S=rows_S, labels_T=labels_T, fuse_S=fuse_S)
