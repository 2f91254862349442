"""Files on their way from one machine to another, with a digest of every byte: taken whole or not at all."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self


class Damaged(Exception):
    """What arrived is not what was sent."""


@dataclass(frozen=True)
class Bundle:
    """Files by their path in the study's folder; `of` makes one, `checked` opens it."""

    files: Mapping[str, bytes]
    digest: str

    @classmethod
    def of(cls, files: Mapping[str, bytes]) -> Self:
        return cls(dict(files), _digest(files))

    def checked(self, is_wanted: Callable[[str], bool] = lambda name: True) -> Mapping[str, bytes]:
        """
        Args:
            is_wanted: whether a file of that path may be in it.

        Raises:
            Damaged: other bytes than those of the digest, or a file of another path.
        """
        if self.digest != _digest(self.files):
            raise Damaged("files that arrived are not those that were sent")
        if strange := [name for name in self.files if not is_wanted(name)]:
            raise Damaged(f"a file arrived that is none of the pack's: {strange[0]!r}")
        return self.files


def _digest(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
