"""Which tokens are written: greedy, beam search or sampling, after prompts of any lengths, freely or among given texts.

Shape letters: N samples, B = N * beams hypotheses, T tokens of the longest text, V vocabulary, S nodes and E edges of a trie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmscale.data.keyed import Purpose, uniform

Step = Callable[[Tensor, Tensor], Tensor]
"""Given the last tokens (B,) and the hypothesis each continues (B,): log-probabilities of the next token (B, V)."""
GoOn = Callable[[bool], bool]
"""From whether this rank has more to write to whether another token is computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are drawn instead of taking the likeliest."""

    temperature: float = 1.0
    """Above 0; the log-probabilities are divided by it."""
    top_k: int = 0
    """Draw among so many of the likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability. Source: Holtzman et al. 2020, section 3.1."""
    seed: int = 0

    def draws(self, positions_N: Tensor, count: int) -> Tensor:
        """Numbers in (0, 1), fp64 (N, count), one a token: keyed by seed and sample, so that no batch and no rank changes a text."""
        found = uniform(self.seed, positions_N.cpu().numpy(), Purpose.WRITE, count)
        return torch.from_numpy(found).to(positions_N.device)

    def choose(self, logits_NV: Tensor, draw_N: Tensor) -> Tensor:
        """Draw a token of each row, (N,), by inverting the distribution function over tokens from the likeliest on."""
        likely_NV, token_NV = (logits_NV.double() / self.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        before_NV = likely_NV.cumsum(-1) - likely_NV
        kept_NV = before_NV < self.top_p
        if self.top_k:
            kept_NV[:, self.top_k :] = False
        mass_NV = torch.where(kept_NV, likely_NV, 0.0).cumsum(-1)
        place_N = (mass_NV <= draw_N[:, None] * mass_NV[:, -1:]).sum(-1).clamp(max=logits_NV.shape[1] - 1)
        chosen_N: Tensor = token_NV.gather(1, place_N[:, None]).squeeze(1)
        return chosen_N


class Trie:
    """Texts, as token ids with the end token last, sharing their beginnings: which tokens may come next.

    Args:
        texts: at least one, none of them empty.
        device: of the ids that it is asked about.

    Attributes:
        longest: tokens of the longest text.
    """

    def __init__(self, texts: Sequence[Sequence[int]], device: torch.device | None = None) -> None:
        children: list[dict[int, int]] = [{}]
        for text in texts:
            node = 0
            for token in text:
                if token not in children[node]:
                    children[node][token] = len(children)
                    children.append({})
                node = children[node][token]
        self.longest = max(map(len, texts))
        self.dead = len(children)  # where a token leads that no text has
        children.append({})
        edges = sorted((node, token, child) for node, tokens in enumerate(children) for token, child in tokens.items())
        nodes_E, self.token_E, self.child_E = torch.tensor(edges, dtype=torch.int64, device=device).unbind(1)
        self.base = int(self.token_E.max()) + 1
        self.key_E = nodes_E * self.base + self.token_E
        counts_S = torch.bincount(nodes_E, minlength=len(children))
        self.first_S = counts_S.cumsum(0) - counts_S
        self.count_S = counts_S

    def allow(self, node_B: Tensor, logits_BV: Tensor) -> Tensor:
        """Put -inf in the place of every token that does not go on from a node."""
        count_B = self.count_S[node_B]
        row = torch.arange(len(node_B), device=node_B.device).repeat_interleave(count_B)
        within = torch.arange(len(row), device=row.device) - (count_B.cumsum(0) - count_B)[row]
        token = self.token_E[self.first_S[node_B][row] + within]
        allowed_BV = torch.full_like(logits_BV, float("-inf"))
        allowed_BV[row, token] = logits_BV[row, token]
        return allowed_BV

    def child(self, node_B: Tensor, token_B: Tensor) -> Tensor:
        """The nodes that tokens lead to."""
        key_B = node_B * self.base + token_B
        place_B = torch.searchsorted(self.key_E, key_B).clamp(max=len(self.key_E) - 1)
        known_B = (self.key_E[place_B] == key_B) & (token_B < self.base)
        return torch.where(known_B, self.child_E[place_B], self.dead)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """What each text starts with, after the begin token: it is read, not chosen."""

    ids_NT: Tensor
    """int64, filled up with 0."""
    length_N: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], device: torch.device) -> Prompts:
        """Fill up lists of ids."""
        longest = max(map(len, prompts), default=0)
        ids = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        ids_NT = torch.tensor(ids, dtype=torch.int64, device=device).view(len(prompts), longest)
        return cls(ids_NT=ids_NT, length_N=torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64, device=device))

    def at(self, t: int) -> tuple[Tensor, Tensor]:
        """Whether each text is still in its prompt at place t, and the prompt's token there, (N,) each."""
        if t >= self.ids_NT.shape[1]:
            return torch.zeros_like(self.length_N, dtype=torch.bool), torch.zeros_like(self.length_N)
        return t < self.length_N, self.ids_NT[:, t]


def search(
    step: Step,
    begin_N: Tensor,
    end: int,
    longest: int,
    beams: int,
    *,
    prompts: Prompts | None = None,
    most_N: Tensor | None = None,
    sampling: Sampling | None = None,
    draws_NT: Tensor | None = None,
    texts: Trie | None = None,
    go_on: GoOn = bool,
) -> list[list[int]]:
    """Keep the `beams` likeliest hypotheses a sample; at the end take the best log-probability a token.

    Args:
        step: log-probabilities of the next token.
        begin_N: first token of each text.
        end: token that ends a text.
        longest: tokens that a prompt and what follows it may have together.
        beams: hypotheses a sample; 1 is greedy.
        prompts: what the texts start with; None for nothing.
        most_N: tokens that each sample may get after its prompt; None for `longest`.
        sampling: draw tokens instead, with one beam.
        draws_NT: its numbers, one a token after the prompt.
        texts: what may be written; None for anything.
        go_on: asked after each token.

    Returns:
        Of each sample the ids after its prompt, without the end token.
    """
    n, device = len(begin_N), begin_N.device
    prompts = prompts or Prompts.of([()] * n, device)
    most_N1 = torch.full_like(begin_N, longest)[:, None] if most_N is None else most_N[:, None]
    own_NB = torch.arange(beams, device=device).expand(n, -1)
    last_B, origin_B = begin_N.repeat_interleave(beams), torch.arange(n * beams, device=device)
    score_NB = torch.full((n, beams), float("-inf"), device=device)
    score_NB[:, 0] = 0.0  # all hypotheses of a sample start equal: only one of them may branch first
    done_NB = torch.zeros(n, beams, dtype=torch.bool, device=device)
    size_NB, node_NB = torch.zeros_like(own_NB), torch.zeros_like(own_NB)
    tokens_NBT = begin_N.new_full((n, beams, longest), end)
    for t in range(longest):
        next_BV = step(last_B, origin_B)
        if texts is not None:
            next_BV = texts.allow(node_NB.flatten(), next_BV)
        next_NBV = next_BV.view(n, beams, next_BV.shape[-1])
        if sampling is None:
            chosen_NB, parent_NB, token_NB = _branch(next_NBV, score_NB, done_NB, end)
        else:
            assert draws_NT is not None
            drawn_N = sampling.choose(next_BV, draws_NT.gather(1, size_NB.clamp(max=draws_NT.shape[1] - 1)).squeeze(1))
            chosen_NB, parent_NB, token_NB = score_NB, own_NB, torch.where(done_NB, end, drawn_N[:, None])
        fixed_N, prompt_N = prompts.at(t)
        fixed_N1 = fixed_N[:, None]
        score_NB = torch.where(fixed_N1, score_NB, chosen_NB)
        parent_NB = torch.where(fixed_N1, own_NB, parent_NB)
        token_NB = torch.where(fixed_N1, prompt_N[:, None], token_NB)
        tokens_NBT = tokens_NBT.gather(1, parent_NB[..., None].expand(-1, -1, longest))
        tokens_NBT[..., t] = token_NB
        was_done_NB = done_NB.gather(1, parent_NB)
        size_NB = size_NB.gather(1, parent_NB) + (~was_done_NB & ~fixed_N1).long()
        done_NB = was_done_NB | (~fixed_N1 & (token_NB == end)) | (size_NB >= most_N1)
        if texts is not None:
            node_NB = node_NB.gather(1, parent_NB)
            node_NB = torch.where(fixed_N1, node_NB, texts.child(node_NB.flatten(), token_NB.flatten()).view(n, beams))
        origin_B, last_B = (torch.arange(n, device=device)[:, None] * beams + parent_NB).flatten(), token_NB.flatten()
        if not go_on(not bool(done_NB.all())):
            break
    best_N1 = (score_NB / size_NB.clamp(min=1)).argmax(1, keepdim=True)
    chosen = tokens_NBT.gather(1, best_N1[..., None].expand(-1, -1, longest)).squeeze(1).tolist()
    written = [ids[start:] for ids, start in zip(chosen, prompts.length_N.tolist(), strict=True)]
    return [ids[: ids.index(end)] if end in ids else ids for ids in written]


def _branch(next_NBV: Tensor, score_NB: Tensor, done_NB: Tensor, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest continuations of each sample's hypotheses, (N, B) each: score, hypothesis that is continued, token."""
    stay_NBV = torch.full_like(next_NBV, float("-inf"))
    stay_NBV[..., end] = 0.0
    total_NBV = score_NB[..., None] + torch.where(done_NB[..., None], stay_NBV, next_NBV)
    best_NB, flat_NB = total_NBV.flatten(1).topk(score_NB.shape[1], dim=1)
    return best_NB, flat_NB // next_NBV.shape[-1], flat_NB % next_NBV.shape[-1]
