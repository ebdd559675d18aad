"""Clips as tubelets. Source: Arnab et al. 2021 (ViViT), sections 3.1 and 3.2.

Shape letters: T frames, H height, W width, P patches, C values of a patch.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy as np

from mmscale.data.decode import decode_image
from mmscale.modalities.modality import Change, Grid, Modality
from mmscale.modalities.pixels import Bytes, cut
from shards.configfile import need
from shards.errors import SampleError
from shards.media import quarter_turns
from shards.sample import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, Sample


@dataclass(frozen=True, kw_only=True)
class Video(Modality):
    """The sample's video or numbered pictures: some frames, squeezed to squares, cut into tubelets."""

    kind: str = "video"
    frames: int = 8
    """Most frames seen; a shorter clip has fewer tubelets."""
    stride: int | None = None
    """Frames between two that are seen, from the first on; null spreads them evenly over the clip."""
    tubelet: int = 2
    """Frames of a tubelet; must divide frames."""
    patch_size: int | None = None
    """Side of a tubelet in pixels."""
    image_size: int | None = None
    """Side of the square frames in pixels."""
    image_mean: tuple[float, float, float] | None = None
    """Mean of red, green and blue in [0, 1]."""
    image_std: tuple[float, float, float] | None = None
    """Standard deviation of red, green and blue."""

    @property
    def values(self) -> int:
        """Three colours of a tubelet."""
        return 3 * self.tubelet * self._patch**2

    @property
    def dtype(self) -> str:
        """Bytes."""
        return "uint8"

    @property
    def grid(self) -> Grid:
        """Tubelets of the longest clip."""
        side = self._side // self._patch
        return self.frames // self.tubelet, side, side

    def check(self, where: str) -> None:
        """Sizes that go into one another."""
        need(
            self.tubelet > 0 and self.frames > 0 and self.frames % self.tubelet == 0,
            f"`{where}.tubelet` must divide frames = {self.frames}; got {self.tubelet}.",
        )
        need(self.stride is None or self.stride > 0, f"`{where}.stride` must be at least 1 or null; got {self.stride}.")
        need(self._side % self._patch == 0, f"`{where}.patch_size` must divide image_size = {self._side}; got {self._patch}.")

    def read(self, sample: Sample, out_PC: Bytes, change: Change) -> Grid | None:
        """Decode the chosen frames, augment them alike, cut."""
        part = next((sample.parts[e] for e in VIDEO_EXTENSIONS if e in sample.parts), None)
        if part is not None:
            frames_THWC = self._decoded(part, sample.key)
        else:
            pictures = sorted((name for name in sample.parts if _is_frame(name)), key=_frame_number)
            if not pictures or _frame_number(pictures[0])[0] > 1:  # 256.jpg alone is an image in another size
                return None
            chosen = [pictures[i] for i in self.chosen(len(pictures))]
            size = self._side
            frames_THWC = np.stack([decode_image(name, sample.parts[name], size, key=sample.key) for name in chosen])
        return cut(np.stack([change(frame) for frame in frames_THWC]), self.tubelet, self._patch, out_PC)

    def chosen(self, count: int) -> list[int]:
        """Which of a clip's frames are seen, ascending: whole tubelets, the last frame repeated where they are not filled."""
        if self.stride is not None:
            found = list(range(0, count, self.stride))[: self.frames]
        else:
            seen = min(count, self.frames)
            found = [(2 * i + 1) * count // (2 * seen) for i in range(seen)]
        return found + [found[-1]] * (-len(found) % self.tubelet)

    def _decoded(self, data: bytes, key: str) -> Bytes:
        """Packets are counted first, then decoded up to the last frame wanted."""
        try:
            with av.open(io.BytesIO(data)) as container:
                if not container.streams.video:
                    raise SampleError(key, "undecodable", "the video part has no pictures")
                count = sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))
            if not count:
                raise SampleError(key, "undecodable", "the video has no frames")
            wanted = self.chosen(count)
            seen = dict(self._frames(data, set(wanted)))
        except (av.FFmpegError, ValueError, EOFError) as e:
            raise SampleError(key, "undecodable", f"the video does not decode ({' '.join(str(e).split())})") from e
        if missing := [i for i in wanted if i not in seen]:
            raise SampleError(key, "undecodable", f"the video breaks off: frame {missing[0]} of {count} does not decode")
        return np.stack([seen[i] for i in wanted])

    def _frames(self, data: bytes, wanted: set[int]) -> Iterator[tuple[int, Bytes]]:
        last, side = max(wanted), self._side
        with av.open(io.BytesIO(data)) as container:
            for index, frame in enumerate(container.decode(container.streams.video[0])):
                if index in wanted:
                    pixels = frame.reformat(side, side, "rgb24", interpolation="BICUBIC").to_ndarray()
                    yield index, np.rot90(pixels, quarter_turns(frame))
                if index == last:
                    return

    @property
    def _patch(self) -> int:
        return self.patch_size or 16

    @property
    def _side(self) -> int:
        return self.image_size or 224


def _frame_number(name: str) -> tuple[int, str]:
    """10.png comes after 9.png, with leading zeros or without."""
    return int(name.partition(".")[0]), name


def _is_frame(name: str) -> bool:
    number, _, extension = name.partition(".")
    return number.isdecimal() and extension in IMAGE_EXTENSIONS
