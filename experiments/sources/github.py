"""Single files of a repository on GitHub, at a fixed commit: the cache first, then the repository itself.

Every file is checked by git's own name of its content, so that it does not matter who gave it: a clone of the repository
that lies in the cache serves as well, and nothing else is taken for it.
"""

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rankwise.experiments.files import replacing
from rankwise.experiments.sources.cache import cache_folder, one_line
from rankwise.experiments.sources.entries import Unavailable
from rankwise.experiments.sources.hub import out_of_reach

ADDRESS = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class Repository:
    """Files of one commit.  files: path -> git's name of the content (of its blob), 40 hexadecimal digits."""

    name: str  # "owner/name"
    commit: str
    licence: str
    files: Mapping[str, str] = field(repr=False)

    @property
    def folder(self) -> Path:
        """Where the cache has it, or a clone of it may be put."""
        return cache_folder() / "data" / self.name.replace("/", "--")

    def file(self, path: str) -> Path:
        """
        Raises:
            Unavailable: it is neither in the cache nor to be had from GitHub, or is another there; says what was tried.
        """
        own, tried = self.folder / path, []
        if own.is_file():
            if blob_name(own) == self.files[path]:
                return own
            tried.append(f"{own}: another version, or damaged")
        else:
            tried.append(f"cache: no {own}, where a clone of the repository serves too")
        if reason := out_of_reach(ADDRESS):
            raise Unavailable(self.name, [*tried, f"GitHub: {reason}"])
        print(f"{self.name}, {path}: licence {self.licence}; downloading from GitHub", file=sys.stderr, flush=True)
        try:
            own.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            said = f"the cache cannot be written: {one_line(error)}; set RANKWISE_CACHE"
            raise Unavailable(self.name, [*tried, said]) from None
        with replacing(own) as temporary:
            try:
                from huggingface_hub.file_download import http_get

                with open(temporary, "wb") as file:
                    http_get(f"{ADDRESS}/{self.name}/{self.commit}/{path}", file, displayed_filename=own.name)
            except Exception as error:  # the errors of whichever HTTP library the hub's client stands on
                raise Unavailable(self.name, [*tried, f"GitHub: {one_line(error)}"]) from None
            if blob_name(temporary) != self.files[path]:
                raise Unavailable(self.name, [*tried, f"GitHub: what it gave as {path} is another file"])
        return own


def blob_name(path: Path) -> str:
    """What git calls a file with this content: sha1 over its size and its bytes."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
