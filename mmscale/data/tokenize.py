"""Text to token ids, by any transformers tokenizer folder. Once loaded it needs only `tokenizers`, so it is light to send to a worker."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from shards.errors import ConfigError

_CHARACTERS_PER_TOKEN = 64
WORDLESS = Path(__file__).resolve().parent / "wordless"
"""A tokenizer of special tokens alone, of stages that read no words."""


def is_wordless(folder: Path) -> bool:
    """Whether the tokenizer in a folder is `WORDLESS`."""
    path = folder / "tokenizer.json"
    return path.is_file() and _entries(path) == _entries(WORDLESS / path.name)


def _entries(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))["model"].get("vocab")


class TextTokenizer:
    """A tokenizer with a beginning and an end: `[CLS] ids [SEP]` where the tokenizer has these, else `bos ids eos`.

    Attributes:
        pad, begin, end: ids of special tokens; without one of its own, pad is the end. begin is None where texts start without.
        mask: id of the mask token, or None.
        vocab_size: one more than the largest id.
        special_ids: ids that stand for no text.
        digest: sha256 of everything that decides the ids.
    """

    def __init__(self, folder: str | Path, begin: bool = True) -> None:
        """Load a folder.

        Args:
            folder: of a transformers tokenizer.
            begin: whether texts start with the begin token.

        Raises:
            ConfigError: no such folder, no tokenizer in it, or one without `tokenizers` form, beginning or end.
        """
        self.folder = str(folder)
        tokenizer = _load(Path(folder))
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"The tokenizer in {self.folder!r} exists in Python only ({type(tokenizer).__name__}). Save it in the form of the "
                "`tokenizers` library (a tokenizer.json), or choose another one."
            )
        self._backend = _plain(backend.to_str())
        first = (tokenizer.cls_token_id, tokenizer.bos_token_id)
        self.begin = _first(self.folder, "beginning (cls or bos)", *first) if begin else None
        self.end = _first(self.folder, "end (sep or eos)", tokenizer.sep_token_id, tokenizer.eos_token_id)
        self.pad = self.end if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self.mask: int | None = None if tokenizer.mask_token_id is None else int(tokenizer.mask_token_id)
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        self.special_ids = sorted({int(i) for i in tokenizer.all_special_ids})

    def encode(self, text: str, max_tokens: int) -> list[int]:
        """Encode one text.

        Args:
            text: any text. Of very long text only the first 64 characters a token are looked at.
            max_tokens: longest result, the two special tokens included; the rest is cut.

        Returns:
            The ids, from begin to end.
        """
        head = text[: max_tokens * _CHARACTERS_PER_TOKEN]
        ids: list[int] = self._backend.encode(head, add_special_tokens=False).ids
        begin = [] if self.begin is None else [self.begin]
        return [*begin, *ids[: max(0, max_tokens - len(begin) - 1)], self.end]

    def prompt(self, text: str, max_tokens: int) -> list[int]:
        """Encode what a text starts with: ids without the begin token, the end token last, which parts it from what follows.

        Args:
            text: any text.
            max_tokens: of the prompt and what follows it; the prompt takes at most half.
        """
        return self.encode(text, max(2, max_tokens // 2))[self.begin is not None :]

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids back into text, without the special tokens."""
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=True))

    @property
    def ordinary_ids(self) -> NDArray[np.int64]:
        """(V',) ids that stand for text, ascending: what a masked token may be replaced by."""
        ids = set(self._backend.get_vocab(with_added_tokens=True).values())
        return np.array(sorted(ids.difference(self.special_ids)), dtype=np.int64)

    @property
    def digest(self) -> str:
        """Sha256 of everything that decides the ids."""
        specials = [self.begin, self.end, self.pad, self.mask, self.special_ids]
        return hashlib.sha256((self._backend.to_str() + json.dumps(specials)).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the backend as its JSON text."""
        return self.__dict__ | {"_backend": self._backend.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild the backend; transformers is not imported."""
        self.__dict__.update(state)
        self._backend = Tokenizer.from_str(state["_backend"])


def _load(folder: Path) -> Any:
    """Load by transformers, and say in one paragraph what is wrong with a folder that does not load."""
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise ConfigError(
            f"There is no tokenizer folder {str(folder)!r}. Write the shards with a tokenizer (`tokenizer.kind=wordpiece`), "
            "or give `data.tokenizer` the folder of a transformers tokenizer."
        )
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as e:
        reason = str(e).strip().split("\n", 1)[0]
        raise ConfigError(f"The folder {str(folder)!r} holds no tokenizer that transformers can load: {reason}.") from e


def _plain(text: str) -> Tokenizer:
    """Rebuild a backend without padding and truncation, which are ours."""
    backend = Tokenizer.from_str(text)
    backend.no_padding()
    backend.no_truncation()
    return backend


def _first(folder: str, what: str, *candidates: int | None) -> int:
    for candidate in candidates:
        if candidate is not None:
            return int(candidate)
    raise ConfigError(
        f"The tokenizer in {folder!r} has no token for the {what} of a text. Add one to its special tokens, or choose another tokenizer."
    )
