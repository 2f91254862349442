"""The folder of an adapter: read with every doubt, written whole or not at all."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.variants.files import json_text
from rankwise.variants.files.facts import Facts
from rankwise.variants.files.peft.names import CONFIG, PICKLE, WEIGHTS
from rankwise.variants.files.system import system_error
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Contents:
    """What stands in a folder.  config is adapter_config.json as it is, None in our own format."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None
    facts: Facts | None


def read(folder: Path) -> Contents:
    """
    Raises:
        ValueError: no adapter there, or a cut-off or foreign file.
    """
    path = folder / WEIGHTS
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give the folder that holds {WEIGHTS}")
    if not path.is_file() and (folder / PICKLE).is_file():
        raise ValueError(
            f"{folder / PICKLE} is a pickle, which can run any code when it is read, and is not opened: load it in PEFT "
            f"where you trust it, and save it there again with save_pretrained(..., safe_serialization=True)"
        )
    if not path.is_file():
        raise ValueError(f"{path} is missing: an adapter folder holds {WEIGHTS} and {CONFIG}; save or copy it again")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut off or no safetensors file ({error}): save or copy it again") from None
    facts = None
    if "rankwise" in metadata:
        try:
            facts = Facts.read(_object(path, lambda _: json_text.parse(metadata["rankwise"])))
        except ValueError as error:
            raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    if metadata.get("format") == "rankwise":
        if facts is None:
            raise ValueError(f'{path}: its metadata has no "rankwise": a foreign file; save it again')
        return Contents(tensors, None, facts)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder / CONFIG} is missing: copy the one that was saved with the weights")
    return Contents(tensors, _object(folder / CONFIG, json_text.read), facts)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """A file of safetensors, its metadata by name: the library's own order differs from call to call, and equal adapters are
    to be equal files."""
    save_file(dict(tensors), path, metadata=dict(metadata))
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) <= size:  # else it was written otherwise than this does, and is valid as it stands
            file.seek(8)
            file.write(ordered.ljust(size))


def write(folder: Path, contents: Contents) -> None:
    """
    Raises:
        ValueError, OSError: as `placed`.
    """
    with placed(folder) as partial:
        metadata = {"format": "rankwise" if contents.config is None else "pt"}
        if contents.facts is not None:
            metadata["rankwise"] = json.dumps(contents.facts.as_json(), sort_keys=True, allow_nan=False)
        tensors = {name: value.detach().cpu().contiguous() for name, value in contents.tensors.items()}
        save_tensors(tensors, partial / WEIGHTS, metadata)
        if contents.config is not None:
            text = json.dumps(contents.config, indent=2, sort_keys=True, allow_nan=False)
            (partial / CONFIG).write_text(text + "\n", encoding="utf-8")
    if contents.config is None:
        (folder / CONFIG).unlink(missing_ok=True)  # of another adapter that was there before


@contextlib.contextmanager
def placed(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write to, whose files are put in place when all are there.

    Raises:
        ValueError: `folder` is a file.
        OSError: what safetensors could not write.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder to write to")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a save that was killed
    partial.mkdir()
    try:
        plain = partial / "permissions"
        plain.touch()
        mode = plain.stat().st_mode
        plain.unlink()
        yield partial
        for file in partial.glob("*.safetensors"):
            file.chmod(mode)  # safetensors 0.8 leaves it readable for its owner only
        if not folder.exists():
            partial.rename(folder)
            return
        for file in sorted(partial.iterdir(), key=lambda file: file.suffix != ".safetensors"):
            file.replace(folder / file.name)
    except SafetensorError as error:
        raise system_error(error, folder) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _object(path: Path, read: Callable[[Path], Any]) -> dict[str, Any]:
    try:
        value = read(path)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text: copy the one that was saved with the weights") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): save or copy it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object: a foreign file; save it again")
    return value
