"""Our training step against that of transformers' FLAVA: the same size, inputs and objectives, on one machine in one run.

    python benchmarks/peers.py [--batch 32] [--rounds 5] [--out benchmarks/results/peers.json]

Both are bare loops of forward, backward, clipping and the same fused AdamW over batches in memory. Objectives: contrastive, image-text
matching, masked language, masked image; for FLAVA its own losses of these names (its masked-image loss predicts one of as many classes
as a patch has values). FLAVA pads texts to the longest of the batch, as its processor does; ours packs them. Both see every image and
every text whole and with hidden parts.

Matching needs mismatched pairs. Ours draws one for every pair. FLAVA takes what stands in its batch; two cases are measured:
`doubled`: its batch holds every pair and as many mismatched ones, so that both compute the same losses over the same pairs;
`half`: its batch holds as many rows as ours, half of them mismatched, so that it computes half the losses. Samples are counted as rows of
ours in both cases.

The two take turns step by step (A B, B A, ...). Ratios are those of a round's sums; medians are kept. CPU time does not count what other
processes take meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import FlavaConfig, FlavaForPreTraining

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.synthetic import PEERS, SPECIAL, model_config, stage_config, synthetic_batch
from mmscale.config import OptimizerConfig
from mmscale.data.batch import Batch, TextStream
from mmscale.engine import Trainee
from mmscale.model import MMScaleConfig, MMScaleModel
from mmscale.objectives import build_objectives
from mmscale.optim import build_optimizer

ROUND = 4
"""Steps of each in a round."""
LONGEST = 24
VOCABULARY = 4096
Step = Callable[[int], float]


def optimizing(model: nn.Module, loss: Callable[[int], Tensor]) -> Step:
    """Take a training step over batch number i; its loss is returned."""
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-4))

    def step(index: int) -> float:
        optimizer.zero_grad()
        value = loss(index)
        value.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return value.item()

    return step


def ours(shape: MMScaleConfig, objectives: Sequence[Any], batches: Sequence[Batch]) -> tuple[nn.Module, Step]:
    """Our model and its step."""
    trainee = Trainee(MMScaleModel(shape), objectives).train()
    factors = [torch.tensor([1 / max(1.0, o.count(b)) for o in objectives]) for b in batches]
    return trainee, optimizing(trainee, lambda i: trainee(batches[i], factors[i])[0])


def flava_config(shape: MMScaleConfig) -> FlavaConfig:
    """FLAVA of the same widths and depths."""
    size = {
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_heads,
        "intermediate_size": shape.expert("image").mlp,
    }
    lower = size | {"num_hidden_layers": shape.unimodal_layers}
    image = {"image_size": shape.image_size, "patch_size": shape.patch_size, "vocab_size": shape.patch_values}
    return FlavaConfig(
        image_config=lower | image,
        text_config=lower | {"vocab_size": shape.vocab_size, "max_position_embeddings": shape.max_text_tokens},
        multimodal_config=size | {"num_hidden_layers": shape.fusion_layers},
        hidden_size=shape.hidden_size,
        projection_dim=shape.projection_size,
        init_codebook=False,
        global_backprop_contrastive=False,
    )


def flava(shape: MMScaleConfig, batches: Sequence[Batch], doubled: bool) -> tuple[nn.Module, Step]:
    """FLAVA and its step."""
    model = FlavaForPreTraining(flava_config(shape)).train()
    inputs = [flava_inputs(shape, batch, doubled) for batch in batches]
    # FLAVA writes into the labels it is given
    return model, optimizing(model, lambda i: model(**{k: v.clone() for k, v in inputs[i].items()}, return_loss=True).loss)


def flava_inputs(shape: MMScaleConfig, batch: Batch, doubled: bool) -> dict[str, Tensor]:
    """The same pairs as FLAVA takes them, and the mismatched ones: an image with the text of the next."""
    rows = torch.arange(batch.size)
    images = torch.cat([rows, rows]) if doubled else rows
    wrong = torch.arange(len(images)) >= (batch.size if doubled else batch.size // 2)
    texts = torch.where(wrong, (images + 1) % batch.size, images)
    ids, mask = padded(batch.caption, batch.caption.ids_T, SPECIAL["pad"])
    masked, _ = padded(batch.text, batch.text.ids_T, SPECIAL["pad"])
    labels, _ = padded(batch.text, batch.text.labels_T, -100)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (shape.image_mean, shape.image_std))
    pixels = (batch.pixels_NCHW.float() / 255 - mean) / std
    classes = torch.randint(0, shape.patch_values, batch.patch_mask_NP.shape, generator=torch.Generator().manual_seed(0))
    return {
        "pixel_values": pixels[images],
        "bool_masked_pos": batch.patch_mask_NP[images].long(),
        "mim_labels": classes[images],
        "input_ids": ids[texts],
        "input_ids_masked": masked[texts],
        "attention_mask": mask[texts].long(),
        "mlm_labels": labels[texts],
        "itm_labels": (~wrong).long(),
    }


def padded(stream: TextStream, values_T: Tensor, fill: int) -> tuple[Tensor, Tensor]:
    """A stream as rows of the longest one's length, and which places are its own."""
    parts = values_T.tensor_split(stream.cu_seqlens_S1[1:-1].long())
    rows = nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=fill)
    lengths = stream.cu_seqlens_S1.diff()
    return rows, torch.arange(rows.shape[1])[None] < lengths[:, None]


def timed(step: Step, index: int) -> tuple[float, float]:
    """Wall and CPU seconds of a step."""
    wall, cpu = time.perf_counter(), time.process_time()
    loss = step(index)
    assert loss == loss, "a loss is not a number"
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(shape: MMScaleConfig, objectives: Sequence[Any], batch: int, rounds: int, doubled: bool) -> dict[str, Any]:
    """Measure one case."""
    torch.manual_seed(0)
    batches = [synthetic_batch(shape, batch, i, longest=LONGEST) for i in range(ROUND)]
    (mine, a), (theirs, b) = ours(shape, objectives, batches), flava(shape, batches, doubled)
    sums = []
    for number in range(-1, rounds):
        pair: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
        for turn in range(ROUND if number >= 0 else 1):
            order = [(a, pair[0]), (b, pair[1])]
            for step, times in order if turn % 2 == 0 else order[::-1]:
                times.append(timed(step, turn))
        if number >= 0:
            sums.append([[sum(t[i] for t in side) for i in (0, 1)] for side in pair])
    report: dict[str, Any] = {"flava_batch": "doubled" if doubled else "half", "batch": batch, "rounds": rounds}
    for i, name in enumerate(("wall", "cpu")):
        ratios = sorted(s[1][i] / s[0][i] for s in sums)
        report[f"samples_per_s_ratio_{name}"], report[f"{name}_ratios"] = statistics.median(ratios), ratios
        for side, who in enumerate(("mmscale", "flava")):
            report[f"{who}_{name}_ms"] = 1000 * statistics.median(s[side][i] for s in sums) / ROUND
    return report | {who: {"parameters": sum(p.numel() for p in m.parameters())} for who, m in (("mmscale", mine), ("flava", theirs))}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both cases and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "peers.json")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("words", nargs="*", help="key=value words of the model, over the default's")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        config = stage_config(Path(place), [*PEERS, *given.words])
    shape = model_config(config, VOCABULARY)
    cases = [compare(shape, build_objectives(config), given.batch, given.rounds, doubled) for doubled in (True, False)]
    for case in cases:
        print(
            f"{case['flava_batch']:8} ours {case['samples_per_s_ratio_cpu']:.2f} x FLAVA's samples/s by CPU time, "
            f"{case['samples_per_s_ratio_wall']:.2f} x by the clock",
            flush=True,
        )
    report = {
        "benchmark": "peers",
        "what": "our training step against transformers' FlavaForPreTraining: same size, inputs and objectives; fp32, 1 thread",
        "ratio": f"FLAVA's time over ours for the same samples, medians over rounds of {ROUND} steps each",
        "model": [*PEERS, *given.words],
        "results": cases,
        "machine": {"cores": os.cpu_count(), "system": platform.platform()},
        "versions": {n: version(n) for n in ("mmscale", "torch", "transformers")} | {"python": platform.python_version()},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
