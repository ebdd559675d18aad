"""Captions from images: greedy and beam decoding over a cache of keys and values.

The image goes once through both stacks; its keys and values in the fusion layers are kept. Each new token goes through the lower
text layers against its own past, then through the fusion layers against the image and its past: what the prefix-LM saw in training.

Shape letters: N images, L image tokens, B = N * beams hypotheses, T tokens so far, H heads, K width of a head, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mmscale.data.batch import Batch
from mmscale.model.attention import dense_plan
from shards.errors import ConfigError

if TYPE_CHECKING:
    from mmscale.model.block import Expert
    from mmscale.model.model import MMScaleModel

Step = Callable[[Tensor, Tensor], Tensor]
"""Given the last tokens (B,) and the hypothesis each continues (B,): log-probabilities of the next token (B, V)."""


class CachedDecoder:
    """Decodes one token at a time for every image of a batch.

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
        self._read_images(batch)
        weight, rows = model.language_head.weight, len(batch.image_rows_N) * beams
        shapes = [config.expert("text")] * config.lower_layers("text") + [config.expert("text", fused=True)] * config.fusion_layers
        self.cache = [(weight.new_empty(s), weight.new_empty(s)) for s in ((rows, e.heads, longest, e.width // e.heads) for e in shapes)]

    def _read_images(self, batch: Batch) -> None:
        """Run the images through both stacks; keep their keys and values in the fusion layers, (B, H, L, K) each."""
        x_NLD = self.model.lower_images(batch.pixels_NCHW, batch.patch_mask_NP, batch.image_rows_N[:0])
        plan, (n, length, _) = dense_plan(len(x_NLD), x_NLD.shape[1]), x_NLD.shape
        x_TD = x_NLD.flatten(0, 1)
        for expert in self.model.perception_experts():
            q, k, v = expert.project(x_TD)
            pair = (x.reshape(n, length, *x.shape[1:]).transpose(1, 2).repeat_interleave(self.beams, 0) for x in (k, v))
            self.image_keys.append((next(pair), next(pair)))
            x_TD = expert.combine(x_TD, plan.attend(q, k, v))

    def step(self, ids_B: Tensor, origin_B: Tensor) -> Tensor:
        """Append a token to the hypotheses named by `origin_B`; log-probabilities of the next, fp32 (B, V)."""
        if self.length and not torch.equal(origin_B, torch.arange(len(origin_B), device=origin_B.device)):
            for keys, values in self.cache:
                keys[:, :, : self.length] = keys[origin_B, :, : self.length]
                values[:, :, : self.length] = values[origin_B, :, : self.length]
        model = self.model
        x_BD = model.text_embedding(ids_B, torch.full_like(ids_B, self.length))
        lower = model.config.lower_layers("text")
        experts = model.text_experts()
        for expert, cache in zip(experts[:lower], self.cache[:lower], strict=True):
            x_BD = self._layer(expert, x_BD, cache, None)
        x_BD = model.text_bridge(x_BD)
        for expert, cache, image in zip(experts[lower:], self.cache[lower:], self.image_keys, strict=True):
            x_BD = self._layer(expert, x_BD, cache, image)
        self.length += 1
        logits_BV: Tensor = model.language_head(x_BD)[0]
        return logits_BV.float().log_softmax(-1)

    def _layer(self, expert: Expert, x_BD: Tensor, cache: tuple[Tensor, Tensor], image: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = expert.project(x_BD)
        cache[0][:, :, self.length], cache[1][:, :, self.length] = k, v
        keys, values = (x[:, :, : self.length + 1] for x in cache)
        if image is not None:
            keys, values = torch.cat([image[0], keys], dim=2), torch.cat([image[1], values], dim=2)
        attended = F.scaled_dot_product_attention(q[:, :, None], keys, values)
        return expert.combine(x_BD, attended[:, :, 0])


@torch.no_grad()
def generate(model: MMScaleModel, batch: Batch, *, max_new_tokens: int, beams: int = 1) -> list[list[int]]:
    """Describe each image of a batch.

    Args:
        model: the model; it is put into evaluation mode while decoding.
        batch: its images are used, nothing else.
        max_new_tokens: longest caption in tokens.
        beams: hypotheses an image; 1 is greedy.

    Returns:
        A list of token ids an image, in the order of the images, without the begin and end tokens.

    Raises:
        ConfigError: the model was trained with a tokenizer that has no begin or no end token, or its captions see their future.
    """
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
    if not len(batch.image_rows_N):
        return []
    training = model.training
    model.eval()
    try:
        longest = min(max_new_tokens, model.config.max_text_tokens - 1)
        decoder = CachedDecoder(model, batch, beams=beams, longest=longest)
        return beam_search(decoder.step, batch.pixels_NCHW.new_full((len(batch.image_rows_N),), begin).long(), end, longest, beams)
    finally:
        model.train(training)


def beam_search(step: Step, begin_N: Tensor, end: int, longest: int, beams: int) -> list[list[int]]:
    """Keep the `beams` likeliest hypotheses an image; at the end take the best log-probability a token.

    Args:
        step: log-probabilities of the next token.
        begin_N: first token of each image's caption.
        end: token that ends a caption.
        longest: tokens a caption may have.
        beams: hypotheses an image; 1 is greedy.
    """
    n, device = len(begin_N), begin_N.device
    base_N1 = torch.arange(n, device=device)[:, None] * beams
    last_B = begin_N.repeat_interleave(beams)
    origin_B = torch.arange(n * beams, device=device)
    score_NB = torch.full((n, beams), float("-inf"), device=device)
    score_NB[:, 0] = 0.0  # all hypotheses of an image start equal: only one of them may branch first
    done_NB = torch.zeros(n, beams, dtype=torch.bool, device=device)
    size_NB = torch.zeros(n, beams, dtype=torch.int64, device=device)
    tokens_NBT = begin_N.new_full((n, beams, longest), end)
    for t in range(longest):
        next_NBV = step(last_B, origin_B).view(n, beams, -1)
        stay = torch.full_like(next_NBV, float("-inf"))
        stay[..., end] = 0.0
        total = score_NB[..., None] + torch.where(done_NB[..., None], stay, next_NBV)
        score_NB, flat = total.flatten(1).topk(beams, dim=1)
        parent, token = flat // next_NBV.shape[-1], flat % next_NBV.shape[-1]
        tokens_NBT = tokens_NBT.gather(1, parent[..., None].expand(-1, -1, longest))
        tokens_NBT[..., t] = token
        was_done = done_NB.gather(1, parent)
        size_NB = size_NB.gather(1, parent) + (~was_done).long()
        done_NB = was_done | (token == end)
        origin_B, last_B = (base_N1 + parent).flatten(), token.flatten()
        if bool(done_NB.all()):
            break
    best_N1 = (score_NB / size_NB.clamp(min=1)).argmax(1, keepdim=True)
    chosen = tokens_NBT.gather(1, best_N1[..., None].expand(-1, -1, longest)).squeeze(1).tolist()
    return [ids[: ids.index(end)] if end in ids else ids for ids in chosen]
