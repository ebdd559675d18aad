"""`mmscale model-config`: the call into the middle floor, and what is printed about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml


def print_model_section(folders: Sequence[str]) -> None:
    """Print a part for `model=FILE`: the keys of one checkpoint with both towers, or of one of each."""
    from mmscale.model.pretrained import model_section

    nested: dict[str, Any] = {}
    for key, value in model_section(folders).items():
        head, _, tail = key.partition(".")
        nested |= {head: {**nested.get(head, {}), tail: value} if tail else value}
    print("# fusion_layers is yours to choose: new layers above the towers, or with fewer unimodal_layers the towers' last ones")
    if nested.get("text", {}).get("captions") == "bidirectional":
        print("# text.captions is as the checkpoint was trained; the captioning objective needs causal")
    if "init_text_from" in nested:
        print(f"# and of the stage file: data.tokenizer={nested['init_text_from']}")
    print(yaml.safe_dump(nested, sort_keys=False, allow_unicode=True), end="")
