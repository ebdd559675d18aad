"""Texts from images: decoding over a cache of keys and values. How tokens are chosen is in `search`.

The image goes once through both stacks; its keys and values in the fusion layers are kept. Each new token goes through the lower
text layers against its own past, then through the fusion layers against the image and its past: what the prefix-LM saw in training.

Shape letters: N images, L image tokens, B = N * beams hypotheses, T tokens so far, H heads, K width of a head, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmscale.data.batch import Batch
from mmscale.model.block import convolved
from mmscale.model.convolution import fused_neighbours
from mmscale.model.percepts import Percepts
from mmscale.model.positions import RotaryPlan, Rotation, rotation, text_coordinates
from mmscale.model.search import Prompts, Sampling, Trie, search
from mmscale.model.sequences import Entry, Sequences, arrange, gather_parts, text_starts
from mmscale.model.text_convolution import TextConvolution
from shards.errors import ConfigError

if TYPE_CHECKING:
    from mmscale.model.block import Expert
    from mmscale.model.model import MMScaleModel


class CachedDecoder:
    """Decodes one token at a time for every image (or sample with another item) of a batch.

    Args:
        model: in evaluation mode.
        batch: whose images are described.
        beams: hypotheses an image.
        longest: tokens that the cache holds, the first one included.
    """

    def __init__(self, model: MMScaleModel, batch: Batch, *, beams: int, longest: int) -> None:
        self.model, self.beams, self.length = model, beams, 0
        config = model.config
        self.image_keys: list[tuple[Tensor, Tensor]] = []
        self.seen_BL: Tensor | None = None
        self._read_images(batch)
        weight, rows = model.language_head.weight, len(self.start_B)
        shapes = [config.expert("text")] * config.lower_layers("text") + [config.expert("text", fused=True)] * config.fusion_layers
        self.near: list[Tensor] = []
        if config.text_tower.convolution:
            size = (rows, longest, config.expert("text").width)
            self.near = [weight.new_empty(size) for _ in range(config.lower_layers("text"))]
        self.cache = [(weight.new_empty(s), weight.new_empty(s)) for s in ((rows, e.heads, longest, e.head_size) for e in shapes)]

    def _read_images(self, batch: Batch) -> None:
        """Run the images through both stacks; keep their keys and values in the fusion layers, (B, H, L, K) each.

        Units of several lengths are padded to the longest; `seen_BL` is then 0 where there is a token and -inf elsewhere.
        """
        model = self.model
        percepts = model.lay_out(batch)
        unit_N = torch.arange(len(percepts.rows_U), device=percepts.rows_U.device)
        self.start_B = text_starts(percepts, unit_N).repeat_interleave(self.beams, 0)
        states = model.lower_perception(batch, percepts)
        alone = Entry(unit_N, torch.full_like(unit_N, -1))
        seqs = arrange([alone], unit_N.new_zeros(1), percepts, model.config, states[0].dtype)
        parts: Sequence[Tensor] = gather_parts(states, percepts, seqs.gathers)
        near = fused_neighbours(percepts, seqs.gathers)
        sizes, rows_NL = [len(x_TD) for x_TD in parts], self._rows(percepts, seqs)
        for experts in model.perception_experts():
            parts = convolved(experts, parts, near)
            projected = [expert.project(x_TD) for expert, x_TD in zip(experts, parts, strict=True)]
            q, k, v = (torch.cat(same) for same in zip(*projected, strict=True))
            turned = seqs.plan.rotation.turn(k) if isinstance(seqs.plan, RotaryPlan) else k
            pair = (x[rows_NL].transpose(1, 2).repeat_interleave(self.beams, 0) for x in (turned, v))
            self.image_keys.append((next(pair), next(pair)))
            attended = torch.split(seqs.plan.attend(q, k, v), sizes)
            parts = [expert.combine(*both) for expert, *both in zip(experts, parts, attended, strict=True)]

    def _rows(self, percepts: Percepts, seqs: Sequences) -> Tensor:
        """Buffer rows of each unit's tokens, (N, L), padded by row 0."""
        lengths = [part.lengths(seqs.unit_S) for part in percepts.parts]
        total_N = torch.stack(lengths).sum(0)
        place_L = torch.arange(int(total_N.max()) if len(total_N) else 0, device=total_N.device)
        rows_NL, before_N = torch.zeros(len(total_N), len(place_L), dtype=torch.int64, device=total_N.device), torch.zeros_like(total_N)
        for first_N, length_N in zip(seqs.first_rows, lengths, strict=True):
            inside = (place_L >= before_N[:, None]) & (place_L < (before_N + length_N)[:, None])
            rows_NL = torch.where(inside, (first_N - before_N)[:, None] + place_L, rows_NL)
            before_N = before_N + length_N
        seen_NL = place_L < total_N[:, None]
        if not bool(seen_NL.all()):
            bias_NL = torch.zeros_like(seen_NL, dtype=self.model.language_head.weight.dtype).masked_fill(~seen_NL, float("-inf"))
            self.seen_BL = bias_NL.repeat_interleave(self.beams, 0)
        return rows_NL

    def step(self, ids_B: Tensor, origin_B: Tensor) -> Tensor:
        """Append a token to the hypotheses named by `origin_B`; log-probabilities of the next, fp32 (B, V)."""
        if self.length and not torch.equal(origin_B, torch.arange(len(origin_B), device=origin_B.device)):
            for keys, values in self.cache:
                keys[:, :, : self.length] = keys[origin_B, :, : self.length]
                values[:, :, : self.length] = values[origin_B, :, : self.length]
            for seen_BTD in self.near:
                seen_BTD[:, : self.length] = seen_BTD[origin_B, : self.length]
        model, offset_B = self.model, torch.full_like(ids_B, self.length)
        x_BD = model.text_embedding(ids_B, offset_B)
        lower, experts = model.config.lower_layers("text"), model.text_experts()
        turn = self._rotation(offset_B, fused=False)
        for layer, (expert, cache) in enumerate(zip(experts[:lower], self.cache[:lower], strict=True)):
            if isinstance(expert.convolution, TextConvolution):
                self.near[layer][:, self.length] = x_BD
                x_BD = expert.convolution.next(x_BD, self.near[layer][:, : self.length])
            x_BD = self._layer(expert, x_BD, cache, None, turn)
        x_BD = model.text_bridge(x_BD)
        turn = self._rotation(offset_B + self.start_B, fused=True)
        for expert, cache, image in zip(experts[lower:], self.cache[lower:], self.image_keys, strict=True):
            x_BD = self._layer(expert, x_BD, cache, image, turn)
        self.length += 1
        logits_BV: Tensor = model.language_head(x_BD)[0]
        return logits_BV.float().log_softmax(-1)

    def _rotation(self, offset_B: Tensor, fused: bool) -> Rotation | None:
        """Angles of text at these positions; None where positions are learned."""
        config = self.model.config
        if config.positions != "rotary":
            return None
        return rotation(text_coordinates(offset_B), config.expert("text", fused).head_size, config.rotary_base)

    def _layer(
        self,
        expert: Expert,
        x_BD: Tensor,
        cache: tuple[Tensor, Tensor],
        image: tuple[Tensor, Tensor] | None,
        turn: Rotation | None,
    ) -> Tensor:
        q, k, v = expert.project(x_BD)
        if turn is not None:
            q, k = turn.turn(q), turn.turn(k)
        cache[0][:, :, self.length], cache[1][:, :, self.length] = k, v
        keys, values = (x[:, :, : self.length + 1] for x in cache)
        bias = None
        if image is not None:
            if self.seen_BL is not None:
                bias = F.pad(self.seen_BL, (0, keys.shape[2]))[:, None, None]
            keys, values = torch.cat([image[0], keys], dim=2), torch.cat([image[1], values], dim=2)
        attended = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=bias)
        return expert.combine(x_BD, attended[:, :, 0])


@torch.no_grad()
def generate(
    model: MMScaleModel,
    batch: Batch,
    *,
    max_new_tokens: int,
    beams: int = 1,
    prompts: Sequence[Sequence[int]] | None = None,
    sampling: Sampling | None = None,
    texts: Trie | None = None,
) -> list[list[int]]:
    """Write a text to each image of a batch, or to what a sample has instead.

    Under ZeRO 3 all ranks call, and compute equally many tokens, whatever their batches hold.

    Args:
        model: the model; it is put into evaluation mode while decoding.
        batch: its images are used, and for `sampling` its positions.
        max_new_tokens: longest text in tokens, its prompt not counted.
        beams: hypotheses an image; 1 is greedy.
        prompts: of each image the ids that its text starts with after the begin token, of any lengths; None for none.
        sampling: draw tokens instead of taking the likeliest; with one beam.
        texts: what may be written; None for anything.

    Returns:
        A list of token ids an image, in the order of the images, without the prompt and without the begin and end tokens.

    Raises:
        ConfigError: the model was trained with a tokenizer that has no begin or no end token, or its captions see their future; beams and
            sampling together; prompts and texts that are longer than the model's texts.
    """
    begin, end = _check(model, beams, sampling)
    sharded = _is_sharded(model)
    if not len(batch.perception_rows_N) and not sharded:
        return []
    room = model.config.max_text_tokens - 1
    prompted = Prompts.of([()] * len(batch.perception_rows_N) if prompts is None else prompts, batch.positions_M.device)
    most_N = (room - prompted.length_N).clamp(max=max_new_tokens)
    least = 1 if texts is None else texts.longest
    if bool((room - prompted.length_N < least).any()):
        raise ConfigError(
            f"The longest prompt has {int(prompted.length_N.max())} tokens and what follows needs {least}; the model's texts have at most "
            f"{room} after the begin token. Shorten the prompts, or train with a larger model.max_text_tokens."
        )
    if texts is not None:  # a limit must not cut an answer
        most_N = most_N.clamp(min=least)
    longest = room if sharded else int((prompted.length_N + most_N).max())
    begin_N = torch.full_like(batch.perception_rows_N, begin)
    training = model.training
    model.eval()
    try:
        decoder = CachedDecoder(model, batch, beams=beams, longest=longest)
        return search(
            decoder.step,
            begin_N,
            end,
            longest,
            beams,
            prompts=prompted,
            most_N=most_N,
            sampling=sampling,
            draws_NT=None if sampling is None else sampling.draws(batch.positions_M[batch.perception_rows_N], room),
            texts=texts,
            go_on=_any_rank if sharded else bool,
        )
    finally:
        model.train(training)


def _check(model: MMScaleModel, beams: int, sampling: Sampling | None) -> tuple[int, int]:
    """Ids of the begin and end tokens."""
    if model.config.text_tower.captions == "bidirectional":
        raise ConfigError(
            "The model cannot generate captions: with `model.text.captions=bidirectional` a token sees what comes after it. "
            "Train with model.text.captions=causal and the captioning objective."
        )
    begin, end = model.config.bos_token_id, model.config.eos_token_id
    if begin is None or end is None:
        raise ConfigError(
            "The model's tokenizer has no begin or no end token, which generating captions needs: `bos_token_id` and `eos_token_id` "
            f"of its config.json are {begin} and {end}. Train with a tokenizer that has both."
        )
    if sampling is not None and beams > 1:
        raise ConfigError(f"`temperature` draws tokens, `beams` = {beams} looks for the likeliest ones. Set beams=1, or temperature=0.")
    return begin, end


def _is_sharded(model: MMScaleModel) -> bool:
    """Whether ZeRO 3 leaves a rank a share of each weight: then every layer must be called equally often on all ranks."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return several and any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _any_rank(more: bool) -> bool:
    """Whether some rank has more to write (all ranks call)."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flag = torch.tensor([more], dtype=torch.int32, device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())
