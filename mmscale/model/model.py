"""The multiway fusion Transformer: modality experts, lower layers within a modality, upper layers across.

One forward serves every objective. Every module runs exactly once in it, on every rank, whatever the batch holds: what is not
there is an empty slice, which keeps the graph. So ZeRO-3 gathers the same weights in the same order everywhere.

Shape letters: M samples, N images, P patches, L image tokens, S sequences, U text tokens, D hidden size, E projection size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from mmscale.data.batch import Batch, TextStream
from mmscale.model.attention import dense_plan, ragged_plan
from mmscale.model.block import Expert, FusionBlock, UnimodalBlock, run_block
from mmscale.model.configuration import MMScaleConfig
from mmscale.model.embeddings import ImageEmbedding, TextEmbedding
from mmscale.model.heads import ContrastiveScale, LanguageHead, NormHead, PooledProjection, Projection
from mmscale.model.initialize import initialize_module
from mmscale.model.pairs import draw_negatives, offsets_in_sequences
from mmscale.model.pretrained import LoadReport, load_towers
from mmscale.model.readout import Lower, read_heads
from mmscale.model.sequences import Readout, Sequences, Wanted, arrange, entries, readout
from mmscale.model.state import State, by_row
from mmscale.model_config import ModelConfig

if TYPE_CHECKING:
    from mmscale.objectives.base import Objective, Term


Block = TypeVar("Block", bound=nn.Module)


class MMScaleModel(PreTrainedModel):  # type: ignore[misc]
    """The model: `MMScaleModel(config)`, `from_pretrained(folder)`, `save_pretrained(folder)`."""

    config_class = MMScaleConfig
    base_model_prefix = ""
    main_input_name = "batch"
    _no_split_modules = ("UnimodalBlock", "FusionBlock")

    def __init__(self, config: MMScaleConfig) -> None:
        super().__init__(config)
        self.image_embedding = ImageEmbedding(config)
        self.text_embedding = TextEmbedding(config)
        image, text = config.expert("image"), config.expert("text")
        self.image_layers = nn.ModuleList(UnimodalBlock(config, image) for _ in range(config.lower_layers("image")))
        self.text_layers = nn.ModuleList(UnimodalBlock(config, text) for _ in range(config.lower_layers("text")))
        bridged = text.width != config.hidden_size
        self.text_bridge: nn.Module = nn.Linear(text.width, config.hidden_size) if bridged else nn.Identity()
        self.fusion_layers = nn.ModuleList(FusionBlock(config) for _ in range(config.fusion_layers))
        pooled = config.image_tower.pooling == "attention"
        self.image_projection: Projection = PooledProjection(config, image) if pooled else Projection(config, image)
        self.caption_projection = Projection(config, text, bias=config.text_tower.projection_bias)
        self.contrastive_scale = ContrastiveScale()
        self.language_head = LanguageHead(config)
        self.matching_head = NormHead(config, 1)
        self.pixel_head = NormHead(config, config.patch_values)
        self.feature_head = NormHead(config, config.hidden_size)
        self.task_heads = nn.ModuleDict({name: NormHead(config, outputs) for name, outputs in (config.heads or {}).items()})
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        initialize_module(module, self.config)

    def forward(self, batch: Batch, objectives: Sequence[Objective]) -> dict[str, Term]:
        """Compute the terms of the loss, by the objectives' names.

        Every term is connected to every trained parameter. With contrastive learning over several ranks all ranks call.
        """
        state = self.run(batch, Wanted.of(objectives))
        terms = {objective.name: objective.loss(state, batch, self) for objective in objectives}
        return {name: replace(term, sum=term.sum + state.zero) for name, term in terms.items()}

    def run(self, batch: Batch, wanted: Wanted) -> State:
        """Run every module once and collect what the heads give."""
        hidden = batch.patch_mask_NP.any(1).nonzero().squeeze(1) if wanted.masked_image else batch.image_rows_N[:0]
        lower = self.lower(batch, hidden)
        negatives = self._negatives(batch, wanted, lower)
        seqs = arrange(entries(batch, wanted, negatives, hidden), lower.text_offsets, self.config.image_tokens, lower.text_UD.dtype)
        labels_U = torch.cat([batch.caption.labels_T, batch.text.labels_T])
        rows = readout(seqs, labels_U, batch.patch_mask_NP, hidden, wanted, self.config.image_tower.leading_tokens)
        image_RD, text_RD = self.upper(lower, seqs, rows)
        return read_heads(self, batch, wanted, lower, (seqs, rows, hidden), (image_RD, text_RD))

    def lower(self, batch: Batch, hidden: Tensor) -> Lower:
        """Run both lower stacks: all images and those with hidden patches once more, causal captions, bidirectional texts."""
        image_NLD = self.lower_images(batch.pixels_NCHW, batch.patch_mask_NP, hidden)
        text_UD, text_offsets = self.lower_text(batch.caption, batch.text)
        _, image_NE = self.project_images(image_NLD[: len(batch.image_rows_N)])
        ends_S = batch.caption.cu_seqlens_S1[1:].long() - 1
        caption_SD, caption_SE = self.caption_projection(text_UD.index_select(0, ends_S))
        text_UD, caption_SD = self._bridge(text_UD, caption_SD)
        scale, bias = self.contrastive_scale()
        return Lower(image_NLD, text_UD, text_offsets, image_NE, caption_SD, caption_SE, scale, bias)

    def lower_images(self, pixels_NCHW: Tensor, mask_NP: Tensor, hidden: Tensor) -> Tensor:
        """The perception expert's lower stack, (N + len(hidden), L, D)."""
        x_NLD: Tensor = self.image_embedding(pixels_NCHW, mask_NP, hidden)
        plan, shape = dense_plan(len(x_NLD), x_NLD.shape[1]), x_NLD.shape
        x_TD = x_NLD.flatten(0, 1)
        for block in self.image_layers:
            x_TD = run_block(block, self._recompute, x_TD, plan)
        return x_TD.view(shape)

    def project_images(self, image_NLD: Tensor) -> tuple[Tensor, Tensor]:
        """Pool the lower stack's states of images: the normed states (N, D), and unit vectors in fp32 (N, E)."""
        pooled: tuple[Tensor, Tensor] = self.image_projection(
            image_NLD if isinstance(self.image_projection, PooledProjection) else image_NLD[:, 0]
        )
        return pooled

    def _bridge(self, text_UD: Tensor, caption_SD: Tensor) -> tuple[Tensor, Tensor]:
        """Bring the states of a text tower of another width to the width of the fusion layers, in one call."""
        if isinstance(self.text_bridge, nn.Identity):
            return text_UD, caption_SD
        bridged: Tensor = self.text_bridge(torch.cat([text_UD, caption_SD]))
        return bridged[: len(text_UD)], bridged[len(text_UD) :]

    def lower_text(self, causal: TextStream, bidirectional: TextStream) -> tuple[Tensor, Tensor]:
        """The text expert's lower stack over both streams, one after the other.

        The first is causal unless `text.captions` is bidirectional.

        Returns:
            (U, width of text) states, and the int64 offsets of all sequences.
        """
        ids_U = torch.cat([causal.ids_T, bidirectional.ids_T])
        offsets_U = torch.cat([offsets_in_sequences(causal), offsets_in_sequences(bidirectional)])
        x_UD: Tensor = self.text_embedding(ids_U, offsets_U)
        lengths = [s.cu_seqlens_S1.diff().long() for s in (causal, bidirectional)]
        first = lengths[0] if self.config.text_tower.captions == "bidirectional" else torch.zeros_like(lengths[0])
        lengths_S, prefix_S = torch.cat(lengths), torch.cat([first, lengths[1]])
        plan = ragged_plan(lengths_S, prefix_S, None, x_UD.dtype)
        for block in self.text_layers:
            x_UD = run_block(block, self._recompute, x_UD, plan)
        return x_UD, torch.cat([lengths_S.new_zeros(1), lengths_S.cumsum(0)])

    def upper(self, lower: Lower, seqs: Sequences, rows: Readout) -> tuple[Tensor, Tensor]:
        """Run the fusion layers over re-indexed lower states; the image rows and text rows that heads read."""
        image_TD = lower.image_NLD.index_select(0, seqs.images).flatten(0, 1)
        text_TD = lower.text_UD.index_select(0, seqs.tokens_T)
        read = (rows.image_rows, rows.text_rows)
        if not len(self.fusion_layers):
            return image_TD.index_select(0, read[0]), text_TD.index_select(0, read[1])
        last = len(self.fusion_layers) - 1
        for index, block in enumerate(self.fusion_layers):
            image_TD, text_TD = run_block(block, self._recompute, image_TD, text_TD, seqs.plan, read if index == last else None)
        return image_TD, text_TD

    @torch.no_grad()
    def _negatives(self, batch: Batch, wanted: Wanted, lower: Lower) -> tuple[Tensor, Tensor]:
        if not wanted.matching:
            return batch.image_rows_N[:0], batch.image_rows_N[:0]
        image_ME = by_row(lower.image_NE, batch.image_rows_N, batch.size)
        caption_ME = by_row(lower.caption_SE, batch.caption.rows_S, batch.size)
        image_rows, text_rows, _ = draw_negatives(batch, image_ME @ caption_ME.T * lower.scale, wanted.matching_group)
        return image_rows, text_rows

    @property
    def _recompute(self) -> str:
        return str(self.config.activation_checkpointing) if self.training else "none"

    def text_experts(self) -> list[Expert]:
        """The text expert of every layer, from the bottom."""
        return [b.expert for b in _blocks(self.text_layers, UnimodalBlock)] + [b.text for b in _blocks(self.fusion_layers, FusionBlock)]

    def perception_experts(self) -> list[Expert]:
        """The perception expert of every fusion layer, from the bottom."""
        return [b.perception for b in _blocks(self.fusion_layers, FusionBlock)]

    def load_pretrained_towers(self, config: ModelConfig) -> list[LoadReport]:
        """Start the experts from the local transformers checkpoints that the configuration names."""
        return load_towers(self, config)

    def embed_images(self, batch: Batch) -> Tensor:
        """Unit vectors of the batch's images, fp32 (N, E)."""
        image_NLD = self.lower_images(batch.pixels_NCHW, batch.patch_mask_NP, batch.image_rows_N[:0])
        return self.project_images(image_NLD)[1]

    def embed_captions(self, batch: Batch) -> Tensor:
        """Unit vectors of the batch's captions (causal stream), fp32 (S, E)."""
        text_UD, _ = self.lower_text(batch.caption, no_text(batch))
        embedding_SE: Tensor = self.caption_projection(text_UD.index_select(0, batch.caption.cu_seqlens_S1[1:].long() - 1))[1]
        return embedding_SE

    def match_logits(self, batch: Batch) -> Tensor:
        """Logit that each text (bidirectional stream) belongs to its sample's image, fp32 (S,); every text needs an image."""
        gumbel = torch.full((batch.size, batch.size), 0.0, device=batch.positions_M.device)
        state = self.run(replace(batch, gumbel_MG=gumbel, caption=no_text(batch)), Wanted(matching=True))
        return state.match_logits_R[: len(batch.text.rows_S)]

    def classify(self, batch: Batch, head: str = "label") -> Tensor:
        """Logits of a task head, fp32 (M, C): from the fused text's first token, else the image, else the caption."""
        return self.run(batch, Wanted(classify=True)).class_logits_MC[head]


def _blocks(layers: nn.ModuleList, kind: type[Block]) -> list[Block]:
    return [layer for layer in layers if isinstance(layer, kind)]


def no_text(batch: Batch) -> TextStream:
    """A stream without sequences."""
    text = batch.text
    return TextStream(text.ids_T[:0], text.cu_seqlens_S1[:1] * 0, text.rows_S[:0], text.labels_T[:0], text.fuse_S[:0])


def register() -> None:
    """Make `AutoConfig` and `AutoModel` know the model; importing `mmscale.model` does not change transformers."""
    AutoConfig.register(MMScaleConfig.model_type, MMScaleConfig, exist_ok=True)
    AutoModel.register(MMScaleConfig, MMScaleModel, exist_ok=True)


def parameters_of(model: nn.Module) -> dict[str, Any]:
    """Parameters by top module, for a printed summary."""
    return {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
