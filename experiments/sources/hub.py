"""The Hugging Face hub and its own cache."""

import difflib
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rankwise.experiments.sources.cache import one_line
from rankwise.experiments.sources.entries import CATALOGUE, Unavailable
from rankwise.variants.files import json_text

HUB_SECONDS = 4.0  # how long the hub may take to answer at all before it counts as out of reach
# Everything of a hub repository that a model and its tokenizer or image processor can need: no pickles, no code.
HUB_FILES = [
    "preprocessor_config.json",
    *("config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "spm.model", "*bpe.model"),
]


def hub_out_of_reach() -> str | None:
    """Why the hub cannot be asked, or None where it answers; settled within a few seconds."""
    return out_of_reach()


def out_of_reach(address: str | None = None) -> str | None:
    """Why an address, of the hub where none is given, cannot be asked, or None where it answers.

    The clients that download try again for half a minute before they give up, so we knock first.
    """
    if _is_set("HF_HUB_OFFLINE") or _is_set("TRANSFORMERS_OFFLINE"):
        return "not asked, since HF_HUB_OFFLINE is set"
    answer: list[str | None] = []

    def knock() -> None:
        try:
            from huggingface_hub import constants, get_session

            get_session().head(address or constants.ENDPOINT, timeout=HUB_SECONDS)
            answer.append(None)
        except Exception as error:  # whichever HTTP library the hub's client stands on
            answer.append(f"no connection ({one_line(error)})")

    thread = threading.Thread(target=knock, daemon=True)  # a name server can hang for longer than any timeout
    thread.start()
    thread.join(2 * HUB_SECONDS)
    return answer[0] if answer else f"no answer within {2 * HUB_SECONDS:.0f} seconds"


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").strip().upper() in {"1", "ON", "YES", "TRUE"}


def fetch_from_hub(name: str) -> Path:
    known = [entry.id for entry in CATALOGUE.values() if entry.kind == "model"]
    near = [difflib.get_close_matches(text, known, n=1, cutoff=0.8) for text in (name, f"sentence-transformers/{name}")]
    hint = f"; closest: {(near[0] + near[1])[0]}" if near[0] + near[1] else ""
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*(/[\w.-]*\w[\w.-]*)?", name, flags=re.ASCII):
        raise ValueError(f'model "{name}" is neither a folder nor a hub id such as "owner/name"{hint}')
    tried = ["catalogue: not in it" + hint.replace("; ", ", ")]
    found, reason = hub_snapshot(name, local=True)
    if found:
        return found
    tried.append(f"Hugging Face cache: {reason}")
    found, reason = hub_snapshot(name, local=False)
    if found:
        return found
    tried.append(f"hub: {reason}")
    raise Unavailable(name, tried)


def hub_snapshot(name: str, local: bool) -> tuple[Path | None, str]:
    """The folder of a hub model's files, from the hub's cache (local) or the hub itself; or (None, why).

    A repository without safetensors is taken at the conversion that the hub's own robot proposed, where there is one
    (microsoft/deberta-v3-base is such a case).
    """
    if local and not hub_cache_may_hold(name):
        return None, "not there"
    if not local and (reason := hub_out_of_reach()):
        return None, reason
    try:
        import huggingface_hub
    except ImportError as error:
        return None, one_line(error)
    with _quiet_hub():
        try:
            if local:
                revisions = [None, *_cached_conversions(name)]
            else:
                files = huggingface_hub.HfApi().list_repo_files(name)
                revisions = [None]
                if not any(file in ("model.safetensors", "model.safetensors.index.json") for file in files):
                    proposals = huggingface_hub.HfApi().get_repo_discussions(
                        name, author="SFconvertbot", discussion_type="pull_request"
                    )
                    revisions = [f"refs/pr/{proposal.num}" for proposal in proposals]
                    if not revisions:
                        return None, "the repository has no safetensors weights, and nothing else is loaded"
                print(f"{name}: downloading from the hub; its model card has the licence", file=sys.stderr, flush=True)
            for revision in revisions:
                with suppress(*([OSError, ValueError] if local else [])):
                    folder = Path(
                        huggingface_hub.snapshot_download(
                            name, revision=revision, allow_patterns=HUB_FILES, local_files_only=local
                        )
                    )
                    if (folder / "config.json").is_file() and weights(folder):
                        return folder, ""
            return None, "not there" if local else "no config.json with safetensors weights in the repository"
        except Exception as error:  # the client's errors differ between its versions; all of them mean: not from there
            return None, one_line(error).split(" (Request ID")[0]


def huggingface_home() -> Path:
    """The Hugging Face cache, found without importing the hub's client, which costs half a second."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HOME") or usual).expanduser()


def hub_cache_may_hold(name: str) -> bool:
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or huggingface_home() / "hub"
    return (Path(cache).expanduser() / f"models--{name.replace('/', '--')}" / "snapshots").is_dir()


def _cached_conversions(name: str) -> list[str]:
    from huggingface_hub import constants

    refs = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "refs" / "refs" / "pr"
    return [f"refs/pr/{ref.name}" for ref in sorted(refs.iterdir())] if refs.is_dir() else []


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep the hub client's own warnings off the screen; its progress bars stay on a terminal."""
    import logging

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def weights(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder; empty where they are not whole."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        names = sorted(set(json_text.read(index)["weight_map"].values()))
        shards = [folder / name for name in names if Path(name).name == name]  # a path would lead out of the folder
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    return shards if len(shards) == len(names) and all(shard.is_file() for shard in shards) else []
