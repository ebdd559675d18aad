"""The multiway fusion Transformer: modality experts, lower layers within a modality, upper layers across.

One forward serves every objective. Every module runs exactly once in it, on every rank, whatever the batch holds: what is not
there is an empty slice, which keeps the graph. So ZeRO-3 gathers the same weights in the same order everywhere.

Shape letters: M samples, N images (or samples with any item), P patches, L image tokens, X perception tokens, S sequences,
U text tokens, D hidden size, E projection size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from mmscale.data.batch import Batch, PatchStream, TextStream
from mmscale.modalities.modality import build_modalities, experts_of
from mmscale.model import packed
from mmscale.model.attention import Plan, dense_plan, ragged_plan
from mmscale.model.block import Expert, FusionBlock, UnimodalBlock, run_block
from mmscale.model.configuration import MMScaleConfig
from mmscale.model.convolution import Neighbours, PatchConvolution, fused_neighbours, neighbours_of
from mmscale.model.embeddings import ImageEmbedding, TextEmbedding
from mmscale.model.heads import ContrastiveScale, LanguageHead, NormHead, PooledProjection, Projection
from mmscale.model.initialize import initialize_module
from mmscale.model.pairs import draw_negatives, offsets_in_sequences
from mmscale.model.patch_embedding import PatchEmbedding, stream_of
from mmscale.model.percepts import Part, Percepts, lay_out
from mmscale.model.positions import text_coordinates, with_positions
from mmscale.model.pretrained import LoadReport, load_towers
from mmscale.model.readout import Lower, read_heads
from mmscale.model.sequences import Readout, Sequences, Wanted, arrange, entries, gather_parts, readout
from mmscale.model.sizes import offsets_of, sizes_of
from mmscale.model.state import State, by_row
from mmscale.model.text_convolution import TextConvolution, text_neighbours
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
        self.backend: str | None = None
        """Of torch.compile, where `mmscale.model.compiled` was asked for it."""
        self.modalities = build_modalities(config)
        others = {name: m for name, m in self.modalities.items() if name != "image"}
        native, experts = self.modalities.get("image"), experts_of(self.modalities)[1:]
        self.image_embedding = ImageEmbedding(config) if native is None else PatchEmbedding(config, native)
        self.patch_embeddings = nn.ModuleDict({name: PatchEmbedding(config, m) for name, m in others.items()})
        self.text_embedding = TextEmbedding(config)
        image, text = config.expert("image"), config.expert("text")
        self.image_layers = _perception_layers(config)
        self.expert_layers = nn.ModuleDict({name: _perception_layers(config) for name in experts})
        of_text = TextConvolution if config.text_tower.convolution else None
        self.text_layers = nn.ModuleList(UnimodalBlock(config, text, convolution=of_text) for _ in range(config.lower_layers("text")))
        bridged = text.width != config.hidden_size
        self.text_bridge: nn.Module = nn.Linear(text.width, config.hidden_size) if bridged else nn.Identity()
        self.fusion_layers = nn.ModuleList(FusionBlock(config, experts) for _ in range(config.fusion_layers))
        pooled = config.image_tower.pooling == "attention"
        self.image_projection: Projection = PooledProjection(config, image) if pooled else Projection(config, image)
        self.caption_projection = Projection(config, text, bias=config.text_tower.projection_bias)
        self.contrastive_scale = ContrastiveScale()
        self.language_head = LanguageHead(config)
        self.matching_head = NormHead(config, 1)
        self.pixel_head = NormHead(config, config.patch_values)
        self.patch_heads = nn.ModuleDict({name: NormHead(config, m.values) for name, m in others.items()})
        self.feature_head = NormHead(config, config.hidden_size)
        concat = config.head_pooling == "concat"
        self.task_heads = nn.ModuleDict({name: NormHead(config, outputs, concat=concat) for name, outputs in (config.heads or {}).items()})
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
        percepts = self.lay_out(batch, wanted.masked_image)
        lower = self.lower(batch, percepts)
        negatives = self._negatives(batch, wanted, lower, percepts)
        listed = entries(batch, wanted, negatives, percepts)
        sizes = sizes_of(batch, wanted, self.config)
        seqs = arrange(listed, lower.text_offsets, percepts, self.config, lower.text_UD.dtype, sizes, self.backend)
        labels_U = torch.cat([batch.caption.labels_T, batch.text.labels_T])
        rows = readout(seqs, labels_U, percepts, wanted, concat=self.config.head_pooling == "concat")
        perception_RD, text_RD = self.upper(lower, percepts, seqs, rows)
        return read_heads(self, batch, wanted, lower, (seqs, rows, percepts), (perception_RD, text_RD))

    def lay_out(self, batch: Batch, masked: bool = False) -> Percepts:
        """What the samples show; with `masked`, items with hidden patches once more."""
        streams = {name: self.stream(batch, name) for name in self.modalities}
        percepts = lay_out(batch, streams, self.modalities, self.config, masked)
        if not self.config.image_tower.convolution:
            return percepts
        return replace(percepts, neighbours=neighbours_of(percepts, self.config.square_grid))

    def stream(self, batch: Batch, name: str) -> PatchStream:
        """A modality's patches; a stream without an item where the batch has none."""
        return stream_of(batch, name, self.modalities[name])

    def lower(self, batch: Batch, percepts: Percepts) -> Lower:
        """Run the lower stacks: all items and those with hidden patches once more, causal captions, bidirectional texts."""
        parts = self.lower_perception(batch, percepts)
        text_UD, text_offsets = self.lower_text(batch.caption, batch.text)
        _, image_NE = self.project_items(parts, percepts)
        ends_S = batch.caption.cu_seqlens_S1[1:].long() - 1
        caption_SD, caption_SE = self.caption_projection(text_UD.index_select(0, ends_S))
        text_UD, caption_SD = self._bridge(text_UD, caption_SD)
        scale, bias = self.contrastive_scale()
        return Lower(parts, text_UD, text_offsets, image_NE, caption_SD, caption_SE, scale, bias)

    def lower_perception(self, batch: Batch, percepts: Percepts) -> list[Tensor]:
        """The perception experts' lower stacks; (X, D) of each."""
        embedded: list[list[Tensor]] = [[] for _ in percepts.parts]
        for items in percepts.items:
            if items.tokens is None:
                x_NLD = self.image_embedding(batch.pixels_NCHW, batch.patch_mask_NP, items.copies, batch.kept_NK)
                embedded[items.expert].append(x_NLD.flatten(0, 1))
                continue
            t = items.tokens
            embedding = self.image_embedding if items.name == "image" else self.patch_embeddings[items.name]
            embedded[items.expert].append(embedding(self.stream(batch, items.name), t.patches, t.items, t.hidden, t.order))
        none_TD = next(x_TD for xs in embedded for x_TD in xs)[:0]  # for an expert that no modality goes through
        stacks: list[Any] = [self.image_layers, *self.expert_layers.values()]
        near: Sequence[Neighbours | None] = percepts.neighbours or [None] * len(stacks)
        listed = zip(stacks, embedded, percepts.parts, near, strict=True)
        return [self._run_part(stack, xs or [none_TD], part, beside) for stack, xs, part, beside in listed]

    def _run_part(self, layers: Iterable[nn.Module], embedded: list[Tensor], part: Part, near: Neighbours | None) -> Tensor:
        x_TD = embedded[0] if len(embedded) == 1 else torch.cat(embedded)
        plan: Plan
        if part.length is not None:
            plan = dense_plan(len(x_TD) // part.length, part.length)
        elif packed.packs(x_TD.device, x_TD.dtype) and len(x_TD):
            plan = packed.text_plan(part.lengths_S, 0, 0, len(x_TD), None)
        else:
            plan = ragged_plan(part.lengths_S, part.lengths_S, None, x_TD.dtype)
        places_X3 = part.coordinates_X3 if self.config.positions == "rotary" else None
        plan = with_positions(plan, places_X3, self.config, self.config.expert("image"))
        for block in layers:
            x_TD = run_block(block, self._recompute, x_TD, plan, near)
        return x_TD

    def project_items(self, parts: list[Tensor], percepts: Percepts) -> tuple[Tensor, Tensor]:
        """Pool the lower states of each sample's first item: the normed states (N, D), and unit vectors in fp32 (N, E)."""
        if isinstance(self.image_projection, PooledProjection):  # square images alone
            x_ND = parts[0].view(-1, percepts.parts[0].length or 0, parts[0].shape[1])[: len(percepts.rows_U)]
        else:
            x_ND = _first_tokens(parts, percepts)
        pooled: tuple[Tensor, Tensor] = self.image_projection(x_ND)
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
        text_offsets = offsets_of(causal, bidirectional)
        plan = self._text_plan(causal, bidirectional, text_offsets.diff(), x_UD.dtype)
        places_U3 = text_coordinates(offsets_U) if self.config.positions == "rotary" else None
        plan = with_positions(plan, places_U3, self.config, self.config.expert("text"))
        near = None
        if self.config.text_tower.convolution:
            causal_tokens = 0 if self.config.text_tower.captions == "bidirectional" else len(causal.ids_T)
            near = text_neighbours(offsets_U, text_offsets.diff(), causal_tokens)
        for block in self.text_layers:
            x_UD = run_block(block, self._recompute, x_UD, plan, near)
        return x_UD, text_offsets

    def _text_plan(self, causal: TextStream, bidirectional: TextStream, lengths_S: Tensor, dtype: torch.dtype) -> Plan:
        count = 0 if self.config.text_tower.captions == "bidirectional" else len(causal.rows_S)
        tokens = (len(causal.ids_T), len(causal.ids_T) + len(bidirectional.ids_T))
        if packed.packs(lengths_S.device, dtype) and tokens[1]:
            return packed.text_plan(lengths_S, count, tokens[0] if count else 0, tokens[1], self.config.max_text_tokens)
        return ragged_plan(lengths_S, torch.where(torch.arange(len(lengths_S), device=lengths_S.device) < count, 0, lengths_S), None, dtype)

    def upper(self, lower: Lower, percepts: Percepts, seqs: Sequences, rows: Readout) -> tuple[Tensor, Tensor]:
        """Run the fusion layers over re-indexed lower states; the perception rows and text rows that heads read."""
        parts = (*gather_parts(lower.parts, percepts, seqs.gathers), lower.text_UD.index_select(0, seqs.tokens_T))
        read = (*rows.part_rows, rows.text_rows)
        if not len(self.fusion_layers):
            parts = tuple(x_TD.index_select(0, r) for x_TD, r in zip(parts, read, strict=True))
        last, near = len(self.fusion_layers) - 1, fused_neighbours(percepts, seqs.gathers)
        for index, block in enumerate(self.fusion_layers):
            parts = run_block(block, self._recompute, parts, seqs.plan, read if index == last else None, near)
        if rows.restore is None:
            return parts[0], parts[1]
        return torch.cat(parts[:-1]).index_select(0, rows.restore), parts[-1]

    @torch.no_grad()
    def _negatives(self, batch: Batch, wanted: Wanted, lower: Lower, percepts: Percepts) -> tuple[Tensor, Tensor]:
        if not wanted.matching:
            return percepts.rows_U[:0], percepts.rows_U[:0]
        image_ME = by_row(lower.image_NE, percepts.rows_U, batch.size)
        caption_ME = by_row(lower.caption_SE, batch.caption.rows_S, batch.size)
        image_rows, text_rows, _ = draw_negatives(batch, image_ME @ caption_ME.T * lower.scale, wanted.matching_group)
        return image_rows, text_rows

    @property
    def _recompute(self) -> str:
        return str(self.config.activation_checkpointing) if self.training else "none"

    def text_experts(self) -> list[Expert]:
        """The text expert of every layer, from the bottom."""
        return [b.expert for b in _blocks(self.text_layers, UnimodalBlock)] + [b.text for b in _blocks(self.fusion_layers, FusionBlock)]

    def perception_experts(self) -> list[list[Expert]]:
        """The perception experts of every fusion layer, from the bottom."""
        return [b.in_order[:-1] for b in _blocks(self.fusion_layers, FusionBlock)]

    def patch_head(self, name: str) -> nn.Module:
        """The head that predicts the values of a modality's hidden patches."""
        return self.pixel_head if name == "image" else self.patch_heads[name]

    def embeddings(self) -> list[nn.Module]:
        """The modules that every gradient flows back to: what samples hold enters by one of them."""
        return [self.image_embedding, *self.patch_embeddings.values(), self.text_embedding]

    def load_pretrained_towers(self, config: ModelConfig) -> list[LoadReport]:
        """Start the experts from the local transformers checkpoints that the configuration names."""
        return load_towers(self, config)

    def embed_images(self, batch: Batch) -> Tensor:
        """Unit vectors, fp32 (N, E), of the samples that have an image, or else a video, a sound or an item of another modality."""
        percepts = self.lay_out(batch)
        return self.project_items(self.lower_perception(batch, percepts), percepts)[1]

    def embed_captions(self, batch: Batch) -> Tensor:
        """Unit vectors of the batch's captions (causal stream), fp32 (S, E)."""
        text_UD, _ = self.lower_text(batch.caption, no_text(batch))
        embedding_SE: Tensor = self.caption_projection(text_UD.index_select(0, batch.caption.cu_seqlens_S1[1:].long() - 1))[1]
        return embedding_SE

    def match_logits(self, batch: Batch) -> Tensor:
        """Logit that each text (bidirectional stream) belongs to what its sample shows, fp32 (S,); every sample needs an item."""
        gumbel = torch.full((batch.size, batch.size), 0.0, device=batch.positions_M.device)
        state = self.run(replace(batch, gumbel_MG=gumbel, caption=no_text(batch)), Wanted(matching=True))
        return state.match_logits_R[: len(batch.text.rows_S)]

    def classify(self, batch: Batch, head: str = "label") -> Tensor:
        """Logits of a task head, fp32 (M, C): from the fused text's first token, else the image, else the caption."""
        return self.run(batch, Wanted(classify=True)).class_logits_MC[head]


def _perception_layers(config: MMScaleConfig) -> nn.ModuleList:
    shape, convolution = config.expert("image"), PatchConvolution if config.image_tower.convolution else None
    return nn.ModuleList(UnimodalBlock(config, shape, convolution=convolution) for _ in range(config.lower_layers("image")))


def _blocks(layers: nn.ModuleList, kind: type[Block]) -> list[Block]:
    return [layer for layer in layers if isinstance(layer, kind)]


def _first_tokens(parts: list[Tensor], percepts: Percepts) -> Tensor:
    """The [CLS] of each sample's first item."""
    if len(parts) > 1:
        return torch.cat(parts).index_select(0, percepts.cls_U)
    length = percepts.parts[0].length
    if length is None:
        return parts[0].index_select(0, percepts.cls_U)
    return parts[0].view(-1, length, parts[0].shape[1])[: len(percepts.rows_U), 0]


def no_text(batch: Batch) -> TextStream:
    """A stream without sequences."""
    text = batch.text
    return TextStream(text.ids_T[:0], text.cu_seqlens_S1[:1] * 0, text.rows_S[:0], text.labels_T[:0], text.fuse_S[:0])


def register() -> None:
    """Make `AutoConfig` and `AutoModel` know the model; importing `mmscale.model` does not change transformers."""
    AutoConfig.register(MMScaleConfig.model_type, MMScaleConfig, exist_ok=True)
    AutoModel.register(MMScaleConfig, MMScaleModel, exist_ok=True)
