"""A second copy of a data set, on disk or behind a URL, from which single files are fetched again."""

from __future__ import annotations

import shutil
from pathlib import Path

import obstore
import obstore.exceptions
import obstore.store

from shards.errors import ShardError


class Copies:
    """Files of one folder elsewhere.

    Args:
        place: a folder, or a URL of one: http, https, s3, gs, az.

    Raises:
        ShardError: there is no such folder, or no store of that kind.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self._store: obstore.store.ObjectStore | None = None
        if "://" in place:
            try:
                if place.startswith(("http://", "https://")):
                    self._store = obstore.store.HTTPStore.from_url(place, client_options={"allow_http": True})
                else:
                    self._store = obstore.store.from_url(place)
            except (obstore.exceptions.BaseError, ValueError) as e:
                raise ShardError(f"The copy {place!r} is no store that can be read: {e}. Give a folder, or an http, s3 or gs URL.") from e
        elif not Path(place).is_dir():
            raise ShardError(f"There is no folder {place!r} to fetch from. Give the folder that holds the copies of the tars.")

    def fetch(self, name: str, target: Path) -> str | None:
        """Write a file's bytes to `target`, which is a temporary name.

        Returns:
            None, or why it could not be fetched.
        """
        try:
            if self._store is None:
                shutil.copyfile(Path(self.place) / name, target)
            else:
                with target.open("wb") as file:
                    for chunk in obstore.get(self._store, name).stream():
                        file.write(chunk)
        except (OSError, obstore.exceptions.BaseError) as e:
            target.unlink(missing_ok=True)
            return " ".join(str(e).split())[:300]
        return None
