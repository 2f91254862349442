"""A model that comes as a GGUF file, written once as transformers writes models: bfloat16 weights, tokenizer, configuration.

GGUF files of releases are quantised; what comes out are the dequantised weights, and not those of the original model.
"""

import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from rankwise.experiments.sources.cache import lock
from rankwise.experiments.sources.entries import Entry, Unavailable

VERSION = 1  # part of what such a model is: raise it when the same file comes out otherwise


def converted(entry: Entry, folder: Path) -> Path:
    """The folder of the converted model, beside the file in `folder`.

    Raises:
        Unavailable: the package that reads such files is not installed, or the cache cannot be written.
    """
    ready = folder / f"transformers-{VERSION}"
    if ready.is_dir():
        return ready
    if find_spec("gguf") is None:
        reason = f"{entry.gguf} is here, and the package gguf, which reads it, is not: pip install 'rankwise[gguf]'"
        raise Unavailable(entry.id, [reason])
    with lock(folder.parent / f".{folder.name}.lock", entry.id):
        if ready.is_dir():  # another process was faster
            return ready
        print(f"{entry.id}: converting {entry.gguf}, once (about half a minute)", file=sys.stderr, flush=True)
        try:
            temporary = Path(tempfile.mkdtemp(prefix=".transformers.", suffix=".tmp", dir=folder))
        except OSError as error:
            raise Unavailable(entry.id, [f"the cache cannot be written: {error.strerror}; set RANKWISE_CACHE"]) from None
        try:
            _convert(folder, str(entry.gguf), temporary)
            os.replace(temporary, ready)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return ready


def _convert(folder: Path, file: str, out: Path) -> None:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # save_pretrained refuses a model that says it is quantised, so its weights move into one that does not.
    known = model.config.to_dict()
    config = type(model.config).from_dict({k: v for k, v in known.items() if k not in ("quantization_config", "_name_or_path")})
    plain = type(model)(config).bfloat16()
    plain.load_state_dict(model.state_dict())
    plain.config.dtype = torch.bfloat16
    plain.save_pretrained(out)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(out)
