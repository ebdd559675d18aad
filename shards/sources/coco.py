"""COCO: captions_*.json and instances_*.json beside folders of images. Source: Lin et al. 2014; https://cocodataset.org/#format-data."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from shards.config import WriteConfig
from shards.errors import SourceError
from shards.sources.annotated import AnnotatedSource, Entry, each, media_folder, read_json
from shards.sources.record import Record, refuse_shared_keys, safe_key

KIND = "COCO annotation file"


class CocoSource(AnnotatedSource):
    """One sample an image: its captions, and the categories of its instances as the field `tags`.

    `path` is a file of captions or of instances, told apart by what it holds; `annotations.instances` adds tags to captions.
    """

    def __init__(self, config: WriteConfig) -> None:
        self._path = Path(config.path or "")
        split, root = self._path.stem.rpartition("_")[2], self._path.parent.parent
        super().__init__(config, media_folder(config, (root / split, root / "images" / split, self._path.parent / split)))

    def records(self) -> list[Record]:
        """List the images in the file's order; those without an annotation too."""
        content = read_json(self._path, KIND, ("images", "annotations"))
        images = {entry["id"]: entry for entry in each(content, "images", ("id", "file_name"), self._path)}
        instances = self._config.annotations.instances
        captions: dict[Any, list[str]] = {}
        tags: dict[Any, list[str]] | None = None
        if "categories" in content:
            tags = _tags(content, images, self._path)
        else:
            captions = _captions(content, images, self._path)
        if instances is not None:
            tags = _tags_of(Path(instances), images)
        listed = []
        for identity, image in images.items():
            name = str(image["file_name"])
            fields: dict[str, Any] = {"image_id": identity}
            if tags is not None:
                fields["tags"] = tags.get(identity, [])
            entry = Entry(images=(name,), captions=tuple(captions.get(identity, ())), fields=fields)
            listed.append(Record(safe_key(Path(name).stem), f"{self._path.name}:{identity}", entry))
        if not listed:
            raise SourceError(f"The {KIND} {str(self._path)!r} lists no image. Give another `path`.")
        return refuse_shared_keys(listed)


def _captions(content: dict[str, Any], images: dict[Any, Any], path: Path) -> dict[Any, list[str]]:
    captions: dict[Any, list[str]] = defaultdict(list)
    for annotation in each(content, "annotations", ("image_id", "caption"), path):
        captions[_known(annotation["image_id"], images, path)].append(str(annotation["caption"]))
    return captions


def _tags_of(path: Path, images: dict[Any, Any]) -> dict[Any, list[str]]:
    """Of a second file, which may annotate more images than the first one lists."""
    content = read_json(path, KIND, ("images", "annotations", "categories"))
    return _tags(content, {entry["id"] for entry in each(content, "images", ("id",), path)} | images.keys(), path)


def _tags(content: dict[str, Any], images: Any, path: Path) -> dict[Any, list[str]]:
    """Names of the different categories of each image, in the order of their ids."""
    names = {entry["id"]: str(entry["name"]) for entry in each(content, "categories", ("id", "name"), path)}
    found: dict[Any, set[Any]] = defaultdict(set)
    for annotation in each(content, "annotations", ("image_id", "category_id"), path):
        category = annotation["category_id"]
        if category not in names:
            raise SourceError(f"An annotation of {str(path)!r} is of category {category}, which `categories` does not list. Mend the file.")
        found[_known(annotation["image_id"], images, path)].add(category)
    return {image: [names[category] for category in sorted(categories)] for image, categories in found.items()}


def _known(identity: Any, images: Any, path: Path) -> Any:
    if identity not in images:
        raise SourceError(f"An annotation of {str(path)!r} is of image {identity}, which `images` does not list. Mend the file.")
    return identity
