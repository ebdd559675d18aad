"""BERT (Devlin et al. 2019), RoBERTa (Liu et al. 2019) and its kin, DistilBERT (Sanh et al. 2019): post-norm, bidirectional.

Token type 0, which a single text has throughout, is added to the positions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmscale.model.pretrained.family import Found, TextFamily
from mmscale.model.pretrained.shape import TextShape, activation_of, stack
from mmscale.model.pretrained.source import Source


def _shape(config: Any, positions: int) -> TextShape:
    return TextShape(
        **stack(config),
        embedding_norm=True,
        projection=None,
        positions=positions,
        norm="post",
        captions="bidirectional",
    )


def _bert_shape(config: Any) -> TextShape:
    return _shape(config, config.max_position_embeddings)


def _roberta_shape(config: Any) -> TextShape:
    return _shape(config, config.max_position_embeddings - config.pad_token_id - 1)


def _distilbert_shape(config: Any) -> TextShape:
    return TextShape(
        width=config.dim,
        heads=config.n_heads,
        mlp=config.hidden_dim,
        layers=config.n_layers,
        activation=activation_of(config.activation),
        eps=1e-12,  # written into its code
        embedding_norm=True,
        projection=None,
        positions=config.max_position_embeddings,
        norm="post",
        captions="bidirectional",
    )


def _distilbert_positions(source: Source) -> Tensor:
    return source.take("embeddings.position_embeddings.weight")


def _bert_positions(source: Source) -> Tensor:
    return source.take("embeddings.position_embeddings.weight") + source.take("embeddings.token_type_embeddings.weight")[0]


def _roberta_positions(source: Source) -> Tensor:
    return _bert_positions(source)[source.config.pad_token_id + 1 :]  # which counts from behind the padding's row


def _bert_layer(source: Source, layer: int, place: str) -> Found:
    base = f"encoder.layer.{layer}"
    found = source.joined(f"{place}.qkv", *((f"{base}.attention.self.{part}",) for part in ("query", "key", "value")))
    found |= source.pair(f"{place}.out", f"{base}.attention.output.dense")
    found |= source.pair(f"{place}.attention_norm", f"{base}.attention.output.LayerNorm")
    found |= source.pair(f"{place}.up", f"{base}.intermediate.dense")
    found |= source.pair(f"{place}.down", f"{base}.output.dense")
    return found | source.pair(f"{place}.mlp_norm", f"{base}.output.LayerNorm")


def _distilbert_layer(source: Source, layer: int, place: str) -> Found:
    base = f"transformer.layer.{layer}"
    found = source.joined(f"{place}.qkv", *((f"{base}.attention.{part}_lin",) for part in ("q", "k", "v")))
    found |= source.pair(f"{place}.out", f"{base}.attention.out_lin")
    found |= source.pair(f"{place}.attention_norm", f"{base}.sa_layer_norm")
    found |= source.pair(f"{place}.up", f"{base}.ffn.lin1")
    found |= source.pair(f"{place}.down", f"{base}.ffn.lin2")
    return found | source.pair(f"{place}.mlp_norm", f"{base}.output_layer_norm")


_WORDS, _NORM = "embeddings.word_embeddings.weight", "embeddings.LayerNorm"
BERT = TextFamily(types=("bert",), shape=_bert_shape, words=_WORDS, positions=_bert_positions, norm=_NORM, layer=_bert_layer)
ROBERTA = TextFamily(
    types=("roberta", "xlm-roberta", "camembert"),
    shape=_roberta_shape,
    words=_WORDS,
    positions=_roberta_positions,
    norm=_NORM,
    layer=_bert_layer,
)
DISTILBERT = TextFamily(
    types=("distilbert",),
    shape=_distilbert_shape,
    words=_WORDS,
    positions=_distilbert_positions,
    norm=_NORM,
    layer=_distilbert_layer,
)
