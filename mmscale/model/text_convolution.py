"""What a word learns of the words beside it: a depthwise convolution along the text, before its lower layers.

Two things that a relation holds between, "a circle left of a square", differ by which side of the relation they stand on. By attention and
positions alone a model learns first that they belong together, and only much later which is which; a convolution tells them apart from the
first step. Source: So et al. 2021 (Primer), section 4.2, there of queries, keys and values; here of what a layer reads.

Shape letters: U text tokens, K taps, B hypotheses, T tokens so far, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmscale.model.convolution import Convolution, Neighbours

SPAN = 5
"""Words that the kernel spans, the word itself in the middle."""
PAST = SPAN // 2
"""Words before it; a causal text has no others."""


class TextConvolution(Convolution):
    """Over the words beside it; of causal text over the word itself and those before it."""

    def __init__(self, width: int) -> None:
        super().__init__(width, SPAN)

    def next(self, x_BD: Tensor, seen_BTD: Tensor) -> Tensor:
        """The newest token of causal texts after it, (B, D).

        Args:
            x_BD: the token.
            seen_BTD: what came before it, T >= 0 tokens.
        """
        near_BTD = torch.cat([seen_BTD[:, max(0, seen_BTD.shape[1] - PAST) :], x_BD[:, None]], dim=1)
        weight_TD = self.weight[:, 0, PAST + 1 - near_BTD.shape[1] : PAST + 1].T
        return x_BD + (near_BTD * weight_TD).sum(1)


def text_neighbours(offsets_U: Tensor, lengths_S: Tensor, causal: int) -> Neighbours:
    """Find the words beside each word.

    Args:
        offsets_U: int64 place of each token in its sequence; sequence follows sequence.
        lengths_S: int64 tokens of the sequences.
        causal: tokens at the beginning whose sequences are causal.
    """
    own_U = torch.arange(len(offsets_U), device=offsets_U.device)
    last_U = lengths_S.repeat_interleave(lengths_S, output_size=len(offsets_U)) - 1
    step_K = torch.arange(SPAN, device=offsets_U.device) - PAST
    is_causal_U1 = (own_U < causal)[:, None]

    def rows(step: Tensor, allowed_UK: Tensor) -> Tensor:
        place_UK = offsets_U[:, None] + step
        there_UK = (place_UK >= 0) & (place_UK <= last_U[:, None]) & allowed_UK
        return torch.where(there_UK, own_U[:, None] + step, len(own_U))

    reads_UK = ~is_causal_U1 | (step_K <= 0)
    return Neighbours(rows(step_K, reads_UK), rows(-step_K, reads_UK), tuple(range(SPAN)))
