"""Captions with the splits of Karpathy and Fei-Fei 2015: dataset_flickr30k.json, dataset_flickr8k.json, dataset_coco.json."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from shards.config import WriteConfig
from shards.errors import SourceError
from shards.sources.annotated import AnnotatedSource, Entry, check_splits, each, media_folder, read_json
from shards.sources.record import Record, refuse_shared_keys, safe_key

KIND = "Karpathy split file"


class KarpathySource(AnnotatedSource):
    """One sample an image, with all its captions and the field `split`."""

    def __init__(self, config: WriteConfig) -> None:
        self._path = Path(config.path or "")
        name, beside = self._path.stem.removeprefix("dataset_"), self._path.parent
        super().__init__(config, media_folder(config, [beside / place for place in (f"{name}-images", f"{name}_images", name, "images")]))

    def records(self) -> list[Record]:
        """List the images of the chosen splits in the file's order."""
        content = read_json(self._path, KIND, ("images",))
        images = list(each(content, "images", ("filename", "sentences", "split"), self._path))
        splits = self._config.annotations.splits
        check_splits(splits, (str(image["split"]) for image in images), self._path)
        listed = [self._record(image) for image in images if not splits or str(image["split"]) in splits]
        if not listed:
            raise SourceError(f"The {KIND} {str(self._path)!r} lists no image. Give another `path`.")
        return refuse_shared_keys(listed)

    def _record(self, image: dict[str, Any]) -> Record:
        name = str(PurePosixPath(image.get("filepath") or "", image["filename"]))
        captions = tuple(str(s["raw"]) for s in each(image, "sentences", ("raw",), self._path))
        fields: dict[str, Any] = {key: image[key] for key in ("split", "imgid", "cocoid") if key in image}
        entry = Entry(images=(name,), captions=captions, fields=fields)
        return Record(safe_key(PurePosixPath(name).stem), f"{self._path.name}:{name}", entry)
