"""Memory of a training step: weights, gradients, optimizer, activations; worked out before step 0 and compared with the device.

Model state follows Rajbhandari et al. 2020 (ZeRO), section 5, with what DeepSpeed 0.19 holds besides. Activations are what autograd keeps
of this model's operations, layer by layer, for the tokens of the first batch; `tests/training/test_memory.py` compares both with what
is there.

Letters: d hidden size, w bytes of an activation, f bytes of an attention input, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from mmscale.arithmetic import BatchPlan
from mmscale.config import OptimizerConfig, RunConfig
from mmscale.counts import Counts, Stack
from mmscale.engine import Trainee
from mmscale.model.configuration import ExpertShape, MMScaleConfig
from mmscale.model.convolution import SIDE, TAPS
from mmscale.model.cross_entropy import logits_at_once
from mmscale.model.text_convolution import SPAN
from mmscale.optim import muon_matrices

MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """Which operations run: they keep different things."""

    width: int
    """w: bytes of a weight or an activation."""
    cuda: bool

    @property
    def device(self) -> str:
        """The type of the device."""
        return "cuda" if self.cuda else "cpu"

    @property
    def packed(self) -> bool:
        """Attention over ragged sequences takes the varlen kernel, not padded groups."""
        return self.cuda and self.width == 2

    @property
    def attention(self) -> int:
        """f: attention on CPUs is in fp32."""
        return self.width if self.cuda else 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes a rank needs at its fullest moment, the backward of a micro-step."""

    weights: float
    gradients: float
    optimizer: float
    """Masters, moments and the average."""
    buffers: float
    """Gradients on their way to other ranks; weights that stage 3 has gathered."""
    activations: float
    """Kept from forward to backward."""
    workspace: float
    """What one layer needs besides while its backward runs."""
    host: float
    """In the host's memory: an offloaded optimizer."""

    @property
    def device(self) -> float:
        """All that lies on the device."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations + self.workspace

    def lines(self, available: int | None) -> list[str]:
        """Render it for a person, with a warning where the device has less."""
        names = ("weights", "gradients", "optimizer", "buffers", "activations", "workspace")
        parts = ", ".join(f"{name} {getattr(self, name) / MIB:,.0f}" for name in names)
        host = f"; on the host {self.host / MIB:,.0f} MiB" if self.host else ""
        found = [f"memory      about {self.device / MIB:,.0f} MiB a rank: {parts}{host}"]
        if available is not None and self.device > available:
            found.append(
                f"warning     the device has {available / MIB:,.0f} MiB, less than the estimate: lower train.micro_batch, set "
                "model.activation_checkpointing, raise zero.stage or set zero.offload_optimizer=cpu"
            )
        return found


def device_bytes(device: torch.device) -> int | None:
    """Memory of an accelerator; None for a CPU, whose ranks share the host's."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def estimate(
    trainee: Trainee, config: RunConfig, plan: BatchPlan, dtype: torch.dtype, device: torch.device, first: Sequence[Counts]
) -> Memory:
    """Work out the memory of a run.

    Args:
        trainee: the model with its objectives; under ZeRO 3 its parameters may be sharded.
        config: the run's configuration.
        plan: how its batch is divided.
        dtype: that it computes in.
        device: that it computes on.
        first: micro-batches that stand for all.
    """
    shape = trainee.model.config
    kernels = Kernels(width=2 if dtype == torch.bfloat16 else 4, cuda=device.type == "cuda")
    recompute = str(shape.activation_checkpointing)
    kept = max((activations(shape, c, kernels, recompute) for c in first), default=0.0)
    work = max((workspace(shape, c, kernels, recompute) for c in first), default=0.0)
    work = max([work, *(gathered(shape, c, plan.ranks, config.objectives.contrastive.group) for c in first)])
    return with_state(parameter_sizes(trainee, config.optimizer), config, plan, kernels.width, kept, work)


class ParameterSize(NamedTuple):
    """What matters of a parameter where only memory counts."""

    numel: int
    trained: bool
    moments: int
    """Numbers that the optimizer keeps for each of the parameter's."""


def parameter_sizes(module: nn.Module, optimizer: OptimizerConfig) -> list[ParameterSize]:
    """List the sizes of a model's parameters."""
    muon = set(muon_matrices(module)) if optimizer.name == "muon" else set()
    return [
        ParameterSize(int(getattr(p, "ds_numel", p.numel())), p.requires_grad, p.requires_grad * (1 if name in muon else 2))
        for name, p in module.named_parameters()
    ]


def with_state(sizes: Sequence[ParameterSize], config: RunConfig, plan: BatchPlan, width: int, kept: float, work: float) -> Memory:
    """Add weights, gradients and optimizer to the bytes of activations."""
    zero, stage, ranks = config.zero, config.zero.stage, plan.ranks
    parameters, trained = sum(s.numel for s in sizes), sum(s.numel for s in sizes if s.trained)
    share = ranks if stage >= 1 else 1
    master = 4 if stage >= 1 or width == 2 else 0
    state = (trained * master + sum(4 * s.moments * s.numel for s in sizes)) / share
    average = 0 if config.train.ema_decay is None else trained * 4 / share
    summed = 4 if width == 2 and stage >= 1 and plan.accumulation > 1 else width
    offloaded = zero.offload_optimizer == "cpu"
    owned = trained * (4 if offloaded else summed) / ranks
    # stages 2 and 3 hold their part twice, as it was reduced and laid flat for the optimizer
    gradients = {0: trained * width, 1: trained * summed, 2: 2 * trained * width / ranks, 3: 2 * trained * summed / ranks}[stage]
    if stage == 0 and plan.accumulation == 1:  # they come as activations go, and take their room
        gradients = max(0.0, gradients - kept - work)
    if offloaded:  # the owned gradients go to the host, the others are gone once they are reduced
        gradients = trained * width if stage == 1 else 0
    weights = float(parameters * width)
    buffers = min(zero.reduce_bucket, trained) * width if stage else 0
    if stage == 3:
        small = sum(s.numel for s in sizes if s.numel <= zero.persistence_threshold)
        largest = max((s.numel for s in sizes), default=0)
        weights = (parameters / ranks + small) * width
        buffers += min(parameters - small, zero.prefetch_bucket + 2 * largest) * width
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=0 if offloaded else state + average,
        buffers=buffers,
        activations=kept,
        workspace=work,
        host=state + average + owned if offloaded else 0,
    )


def activations(shape: MMScaleConfig, counts: Counts, kernels: Kernels, recompute: str) -> float:
    """Bytes that a forward of a micro-batch keeps for its backward."""
    d, w, texts, up = shape.hidden_size, kernels.width, counts.texts, counts.upper
    rows = counts.read_items + counts.read_texts
    total = float((counts.values + counts.stems[0]) * w + texts.text_tokens * d * w)
    total += counts.perceived * d * w  # the last lower layer's, which the projection reads
    total += sum(_plan(stack, kernels) + _angles(shape, stack) for stack in (*counts.perception, texts, up))
    total += sum(part.layers * _layer(shape, part, part.stack.tokens, kernels, recompute) for part in _parts(shape, counts))
    for layer in range(shape.fusion_layers):
        last = layer == shape.fusion_layers - 1
        total += _layer(shape, _fused(shape, up), rows if last else up.tokens, kernels, recompute)
    if shape.image_tower.convolution:
        lower, near = shape.lower_layers("image"), TAPS if shape.modalities else SIDE**2
        total += (counts.perceived + up.perceived) * near * 8 * (2 if recompute == "none" else 3)  # rows, those of readers, ways
        if recompute == "none":
            total += (lower * counts.perceived + shape.fusion_layers * up.perceived) * d * w  # what it reads
    if shape.text_tower.convolution:
        total += texts.tokens * SPAN * 2 * 8
        if recompute == "none":
            total += shape.lower_layers("text") * texts.tokens * shape.expert("text").width * w
    embeddings = (counts.perceived + texts.tokens) * d * w * (1 if shape.dropout and not kernels.cuda else 0)
    return total + embeddings + _heads(shape, counts, kernels)


def workspace(shape: MMScaleConfig, counts: Counts, kernels: Kernels, recompute: str) -> float:
    """Bytes besides those kept while the fullest backward of a layer or head runs: its gradients, and what it computes again."""
    d, w, up = shape.hidden_size, kernels.width, counts.upper
    layers = [(part, part.stack.tokens) for part in _parts(shape, counts) if part.layers]
    if shape.fusion_layers:
        layers.append((_fused(shape, up), up.tokens if shape.fusion_layers > 1 else counts.read_items + counts.read_texts))

    def again(part: _Part, rows: int) -> float:
        gone = _layer(shape, part, rows, kernels, "none") - _layer(shape, part, rows, kernels, recompute)
        converted = 2 * w if kernels.attention != w else 0
        return gone + part.stack.tokens * part.expert.width * (2 * kernels.attention + converted)

    # without recomputation the first backward is the fullest: later ones find memory that was given back
    first = layers[-1][0].stack.tokens * 4 * d * w if layers else 0
    logits = min(counts.words * shape.vocab_size, logits_at_once(kernels.device)) * (8 + (w if w < 4 else 0))
    return float(max(first, logits, *(again(*layer) for layer in layers if recompute != "none"), 0))


def gathered(shape: MMScaleConfig, counts: Counts, ranks: int, group: int | None) -> float:
    """Bytes of what the contrastive loss has of all ranks while it is worked out (`mmscale.objectives.sigmoid.gather_sides`).

    They are fp32 embeddings of image and caption with three int64 a sample, twice, as NCCL gathers into one buffer and copies from it.
    """
    crosses = counts.wanted.contrastive and ranks > 1 and (group is None or counts.samples % group != 0)
    return 2.0 * ranks * counts.samples * (8 * shape.projection_size + 24) if crosses else 0.0


@dataclass(frozen=True, slots=True)
class _Part:
    """Tokens of like layers."""

    stack: Stack
    expert: ExpertShape
    layers: int


def _parts(shape: MMScaleConfig, counts: Counts) -> list[_Part]:
    """What each perception expert takes, and the texts, of the lower stack."""
    perceived = [_Part(stack, shape.expert("image"), shape.lower_layers("image")) for stack in counts.perception]
    return [*perceived, _Part(counts.texts, shape.expert("text"), shape.lower_layers("text"))]


def _fused(shape: MMScaleConfig, up: Stack) -> _Part:
    return _Part(up, shape.expert("image", fused=True), shape.fusion_layers)


def _layer(shape: MMScaleConfig, part: _Part, rows: int, kernels: Kernels, recompute: str) -> float:
    """Bytes that a layer keeps; `rows` go on after attention."""
    d, mlp, w, tokens = part.expert.width, part.expert.mlp, kernels.width, part.stack.tokens
    if recompute == "full":
        return tokens * d * w
    out = _attended(part, kernels)
    if recompute == "selective":
        return tokens * 4 * d * w + out + rows * (d + mlp) * w
    dropped = 2 * d * (1 if kernels.cuda else w) if shape.dropout else 0
    fed = rows * (2 * d * w + 8 + 2 * mlp * w + dropped)
    read = rows * d * w  # attention's result as the output layer reads it
    if _direct(part, kernels):
        read = 0  # the very tensor
    return _projected(shape, part, kernels) + _attention_inputs(part, kernels) + out + read + fed


def _projected(shape: MMScaleConfig, part: _Part, kernels: Kernels) -> float:
    """Kept by the norm, the projection and the norms of queries and keys."""
    d, w, heads, tokens = part.expert.width, kernels.width, part.expert.heads, part.stack.tokens
    kept = 2 * d * w + 8
    direct = _direct(part, kernels)
    if not shape.qk_norm:
        turned = 2 if shape.positions == "rotary" else 0  # queries and keys, beside the projection that values are a view of
        return tokens * (kept + ((3 + turned) * d * w if direct else 0))
    kept += 8 * heads + (2 * d * w if direct else 0)
    if kernels.cuda:
        return tokens * (kept + 3 * d * w)
    return tokens * (kept + (5 * d * 4 if w == 4 else 4 * d * 4))


def _direct(part: _Part, kernels: Kernels) -> bool:
    """Whether attention reads the projection itself, not a copy: items alone, or texts alone on a device."""
    stack = part.stack
    if stack.dense:
        return kernels.cuda or kernels.width == 4
    return kernels.packed and not (stack.perceived and stack.text_tokens)


def _attention_inputs(part: _Part, kernels: Kernels) -> float:
    """Copies of queries, keys and values that attention keeps, and projections that it keeps alive as it reads a part of them."""
    d, f, stack = part.expert.width, kernels.attention, part.stack
    if _direct(part, kernels):
        return 0
    if stack.dense:
        return stack.tokens * 3 * d * f
    if kernels.packed:  # `mmscale.model.packed.FusedPlan`
        whole, causal = stack.tokens - stack.keys, stack.keys > 0
        return (3 * whole + 2 * stack.keys + causal * (2 * stack.perceived + stack.text_tokens)) * d * f
    return stack.slots * 3 * d * f


def _attended(part: _Part, kernels: Kernels) -> float:
    """Results of attention and the logarithms of its sums."""
    places = part.stack.tokens if part.stack.dense or kernels.packed else part.stack.slots
    return places * (part.expert.width * kernels.attention + 4 * part.expert.heads)


def _plan(stack: Stack, kernels: Kernels) -> float:
    """Index rows, and masks of padded groups."""
    if kernels.packed:
        return 8.0 * (stack.prefix + stack.rest + stack.keys + stack.tokens)
    return float(stack.masks * kernels.attention + 8 * (stack.slots + stack.tokens))


def _angles(shape: MMScaleConfig, stack: Stack) -> float:
    """Cosines and sines of rotary positions, in fp32, which all layers of a stack share."""
    return stack.tokens * 4.0 * shape.expert("image").head_size if shape.positions == "rotary" else 0.0


def _heads(shape: MMScaleConfig, counts: Counts, kernels: Kernels) -> float:
    d, w = shape.hidden_size, kernels.width
    logits = counts.words * shape.vocab_size
    total = counts.words * (2 * d * w + 20) + (4 * logits if logits <= logits_at_once(kernels.device) else 0)
    total += counts.patches * 2 * d * w + 4 * counts.predicted
    if shape.head_pooling == "concat":  # in fp32: the states, their norm, which token is the largest
        pooled = counts.all_words + counts.all_items
        total += pooled * (8 * d + 8) + counts.samples * 3 * d * 4
    embedded = counts.perceiving + counts.captions
    total += (counts.pooled + embedded) * 2 * d * w + embedded * 8 * shape.projection_size
    return float(total)
