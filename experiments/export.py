"""Taking a trained adapter elsewhere: as a plain LoRA, or as a whole model with the adapter merged into it.

What is exported is a run's folder or any adapter's, ours or PEFT's.  The base model is the one that the run or the adapter
names.  `find` looks without torch, so that what cannot be exported is refused within a second; `export` does it.
"""

import contextlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.experiments import quantization as quantizing
from rankwise.variants.adapter.kinds.scheme import Scheme
from rankwise.variants.files import json_text
from rankwise.variants.files.peft.config import PeftConfig
from rankwise.variants.files.peft.names import CONFIG, PICKLE, WEIGHTS
from rankwise.variants.settings import nearest
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from rankwise.variants.doctor import llama_cpp, reading

KINDS = ("lora", "merged")
RECORD = "export.json"  # in every folder that was exported to: what it was made of
HUB_ID = re.compile(r"[\w.-]*\w[\w.-]*(/[\w.-]*\w[\w.-]*)?", re.ASCII)  # and a name of the catalogue
AUTO = {  # PEFT's task types
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class Source:
    """What is to be exported.

    adapter: its folder. model: name of its base. run: config.json of the run, None for an adapter of no run.
    model_class: of transformers, the model's; None where the base alone says it.
    heads: ends of the names of modules that the adapter holds whole. labels: outputs of a classifier among them.
    quantization: how the base was quantised: "name", "is_double", and "dtype" and "skipped" where it is no run's; None: not.
    """

    adapter: Path
    model: str
    run: dict[str, Any] | None
    model_class: str | None
    heads: tuple[str, ...]
    labels: int | None
    quantization: dict[str, Any] | None = None

    @property
    def scheme(self) -> Scheme | None:
        return Scheme.of_fact(self.quantization)

    @property
    def precision(self) -> str:
        """That the base is loaded in: a quantised one in that which its codes were made from."""
        return "fp32" if self.quantization is None else (self.run or {}).get("precision") or "fp32"


def find(path: Path, to: str, model: str | None, model_class: str | None = None) -> Source:
    """
    Args:
        path: a run's folder, or an adapter's.
        model: name of the base, where another than the one that `path` names is wanted.
        model_class: of transformers, where another than the one that the adapter names is wanted.

    Raises:
        ValueError: no adapter there, one without the form that is asked for, or no base model to be told.
    """
    if to not in KINDS:
        raise ValueError(f"--to {to}: give {', '.join(KINDS)}, kohya or gguf")
    adapter = path / "adapter" if (path / "adapter").is_dir() else path
    if not (adapter / WEIGHTS).is_file() and not (adapter / PICKLE).is_file():
        if (path / "config.json").is_file() and (path / "result.json").is_file():
            raise ValueError(f"{path} is a run without its adapter/: results are kept without weights; run the study again")
        raise ValueError(f"{path} holds no adapter: give a run's folder, or one with {WEIGHTS}")
    run = _object(adapter.parent / "config.json")
    run = run if run is not None and {"fingerprint", "task", "model", "method"} <= run.keys() else None
    config = _config(adapter)
    shapes, facts = _read(adapter / WEIGHTS)
    ours, quantization = facts.get("method"), facts.get("quantization")
    if to == "lora" and ours is not None and config is None:
        raise ValueError(
            f"{path}: {ours} changes the model's own tensors or adds layers, which no low-rank update expresses: use "
            f"--to merged, where it can be merged"
        )
    if to == "lora" and config is not None and config.has_magnitude:
        raise ValueError(
            f"{path} has DoRA's magnitudes, which a plain LoRA cannot hold: programs that know use_dora load the adapter as "
            f"it is; for all others use --to merged"
        )
    if run is not None and model_class is not None:
        raise ValueError(f"--model-class {model_class}: {path} is a run, whose task says the class; leave it out")
    if run is None and config is None:
        raise ValueError(f"{path}: an adapter of {ours or 'no PEFT form'} says neither model nor task: give its run's folder")
    named = model or (run or {}).get("model") or (config.base_model if config is not None else None)
    if not named:
        raise ValueError(f"{path} names no base model: name it with --model")
    if not HUB_ID.fullmatch(named) and not Path(named).expanduser().is_dir():
        raise ValueError(
            f"the base model {named} is a folder that is not there, perhaps of another machine: name a copy with --model"
        )
    if run is not None:
        return Source(adapter, named, run, None, (), None, run.get("quantization"))
    known = model_class or AUTO.get(config.task_type or "") or config.model_class
    if (
        model_class is None
        and known == config.model_class
        and (config.library or "transformers").split(".")[0] != "transformers"
    ):
        raise ValueError(
            f"{path} was trained on a {known} of {config.library}, which is not of transformers: name the class that takes its "
            f"place there with --model-class"
        )
    heads = config.modules_to_save
    return Source(adapter, named, None, known, heads, _labels(shapes, heads, known), quantization)


def export_kohya(path: Path, out: Path, prefix: str) -> dict[str, Any]:
    """Writes `out`/adapter.safetensors in Kohya's names, whole or not at all, from the adapter's file alone.

    Raises:
        ValueError: no adapter there, or one that Kohya's format cannot hold exactly.
    """
    from rankwise.variants.doctor import reading, stored, writing

    adapter = reading.read(path)
    if adapter.form != "PEFT":
        raise ValueError(f"{path} is in {adapter.form}'s format already: rankwise doctor --fix writes it at other ranks")
    check_out(out, adapter.stored.path.parent)
    tensors = writing.as_kohya(adapter, prefix)
    record = _record_of_file("kohya", path, adapter)
    with replaced(out) as partial:
        partial.mkdir(parents=True, exist_ok=True)
        stored.write(partial / writing.KOHYA_FILE, tensors, {"format": "pt"})
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def export_gguf(path: Path, out: Path, model: str | None) -> dict[str, Any]:
    """Writes `out`/adapter.gguf, a LoRA for llama.cpp, whole or not at all, from the adapter's file and its base's config.json.

    Raises:
        ValueError: no adapter there, one that llama.cpp cannot hold, no configuration of its base at hand, or no gguf package.
    """
    from rankwise.variants.doctor import llama_cpp, reading

    try:
        import gguf  # noqa: F401 (asked for before anything is read)
    except ImportError:
        raise ValueError("--to gguf needs the gguf package: pip install 'rankwise[gguf]'") from None
    adapter = reading.read(path)
    if adapter.form != "PEFT":
        raise ValueError(f"{path} is in {adapter.form}'s format, and llama.cpp's is for language models: give a PEFT adapter")
    check_out(out, adapter.stored.path.parent)
    named = model or (adapter.config or {}).get("base_model_name_or_path")
    if not named:
        raise ValueError(f"{path} names no base model: name it with --model")
    form = llama_cpp.as_llama_cpp(adapter, _base_model(named))
    record = _record_of_file("gguf", path, adapter) | {"model": named, "architecture": form.architecture, "alpha": form.alpha}
    with replaced(out) as partial:
        partial.mkdir(parents=True, exist_ok=True)
        _write_gguf(partial / llama_cpp.FILE, form)
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _write_gguf(path: Path, form: "llama_cpp.LlamaCpp") -> None:
    import gguf

    writer = gguf.GGUFWriter(path, form.architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, form.alpha)
        for name, values in form.tensors.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _base_model(named: str) -> "llama_cpp.BaseModel":
    from rankwise.experiments.plan import shapes
    from rankwise.variants.doctor import llama_cpp

    given = shapes.configuration(named)
    if given["model_type"] not in llama_cpp.ARCHITECTURES:  # refused by its type alone
        return llama_cpp.BaseModel(given["model_type"], 0, 0, 0, False)
    try:
        config = shapes.read(given)
        heads = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        return llama_cpp.BaseModel(config.model_type, config.num_hidden_layers, heads, groups, bool(config.tie_word_embeddings))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{named}: its configuration cannot be read: {' '.join(str(error).split())[:300]}") from None


def _record_of_file(to: str, path: Path, adapter: "reading.ThinAdapter") -> dict[str, Any]:
    ranks = [site.rank for site in adapter.sites]
    return {
        "exported": to,
        "of": str(path),
        "method": adapter.method,
        "model": (adapter.config or {}).get("base_model_name_or_path"),
        "total_rank": sum(ranks),
        "sites": sum(rank > 0 for rank in ranks),
        "truncated": False,
    }


def check_out(out: Path, adapter: Path, option: str = "--out") -> None:
    """
    Raises:
        ValueError: a folder that holds anything but an earlier export, or the adapter itself.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{option} {out}: this is a file; name a folder")
    if out.resolve() in (adapter.resolve(), *adapter.resolve().parents):
        raise ValueError(f"{option} {out}: the adapter itself is in there; name another folder")
    if out.is_dir() and any(out.iterdir()) and _object(out / RECORD) is None:
        raise ValueError(f"{option} {out}: this folder holds something that is no earlier export; name a new or an empty one")


def export(
    source: Source,
    to: str,
    out: Path,
    total_rank: int | None = None,
    total_parameters: int | None = None,
    requantize: bool = False,
) -> dict[str, Any]:
    """Writes `out`, whole or not at all, and says what is in it: what RECORD holds.

    A model that is merged over a quantised base is written dequantised.

    Args:
        requantize: quantise the merged weights again instead; the record says what that cost.

    Raises:
        ValueError: the adapter does not fit the model, a budget cannot be met, or nothing was quantised that could be again.
        OSError: the base model could not be obtained, or the disk is full.
    """
    from rankwise import variants
    from rankwise.experiments import models
    from rankwise.variants.adapter.kinds.quantised import scheme_of

    with models.quiet():
        model, processor = load(source, whole=to == "merged")
        adapter = variants.load_pretrained(model, source.adapter)
        if total_rank is not None or total_parameters is not None:
            variants.truncate(adapter, total_rank=total_rank, total_parameters=total_parameters)
        ranks = {name: int(rank[0]) for name, rank in adapter.ranks().items()}
        record = {
            "exported": to,
            "of": str(source.adapter),
            "method": adapter.method,
            "model": source.model,
            "total_rank": sum(ranks.values()) if ranks else None,
            "sites": sum(rank > 0 for rank in ranks.values()) if ranks else None,
            "truncated": total_rank is not None or total_parameters is not None,
        }
        scheme = scheme_of(model)
        if scheme is not None:
            record["quantization"] = str(scheme)
        with replaced(out) as partial:
            if to == "lora":
                variants.export_lora(adapter, partial)
            else:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "a sum cannot be written into a quantised")  # the record says so
                    cost = variants.export_merged(adapter, partial, tokenizer=processor, requantize=requantize)
                if scheme is not None:
                    record |= {"dequantised": cost is None, "requantised": None if cost is None else asdict(cost)}
            (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def costs(requantised: Mapping[str, Any]) -> str:
    """A sentence of what RECORD says of weights that were quantised again."""
    from rankwise.variants.adapter.merging import Requantisation

    return str(Requantisation(**requantised))


def load(source: Source, whole: bool, device: str = "cpu") -> tuple[Any, Any]:
    """The base model with the head that the adapter was trained with, and its tokenizer or image processor where it has one.

    whole: refuse a base that lacks weights which the adapter does not hold either. device: where a base that is quantised as it
    is read stays; others come on the CPU.
    """
    from rankwise.experiments import models, sources, tasks

    try:
        if source.run is not None:
            task = tasks.outputs_of_run(source.adapter.parent, source.run)
            size = source.run.get("training", {}).get("image_size")
            at, form = "cpu" if source.scheme is None else device, source.scheme
            model, processor, _ = models.load(source.model, task, source.precision, at, size, quantization=form)
            return model, processor
        folder = sources.fetch(source.model)
    except sources.Unavailable as error:
        raise ValueError(f"{error}; name a copy that is at hand with --model") from None
    import torch
    import transformers

    options = {"trust_remote_code": False, "local_files_only": True}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        if source.labels is not None:
            config.num_labels = source.labels
        known = source.model_class or next(iter(config.architectures or ()), "AutoModel")
        kind = getattr(transformers, known, None)
        if not hasattr(kind, "from_pretrained"):
            classes = [name for name in dir(transformers) if "For" in name or name.endswith("Model")]
            raise ValueError(f"transformers has no model class {known}{nearest(known, classes)}: name one with --model-class")
        options |= {"dtype": "auto", "use_safetensors": True, "ignore_mismatched_sizes": True}
        if source.scheme is not None and not hasattr(config, "quantization_config"):
            dtype = getattr(torch, str(source.quantization.get("dtype")), torch.float32)
            options |= {"dtype": dtype, **quantizing.options(source.scheme, None, device, source.quantization.get("skipped"))}
        model, found = kind.from_pretrained(folder, config=config, output_loading_info=True, **options)
    except (ValueError, KeyError, ImportError, OSError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{source.model} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    missing = [*found["missing_keys"], *(key[0] if isinstance(key, tuple) else key for key in found["mismatched_keys"])]
    astray = sorted(key for key in missing if not any(f".{head}." in f".{key}" for head in source.heads))
    if whole and astray:
        raise ValueError(
            f"{source.model} lacks {len(astray)} weights of a {type(model).__name__}, {astray[0]} among them, and the adapter "
            f"does not hold them: name the model that it was trained on with --model, or its class with --model-class"
        )
    model.config._name_or_path = source.model
    processor = None
    for auto in (transformers.AutoTokenizer, transformers.AutoImageProcessor):
        with contextlib.suppress(Exception):  # where there is none, each class fails in a way of its own
            processor = auto.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            break
    return model.eval(), processor


def _labels(shapes: dict[str, list[int]], heads: tuple[str, ...], model_class: str | None) -> int | None:
    """Outputs of a classifier in the file: rows of the last matrix of its head."""
    if "Classification" not in (model_class or ""):
        return None
    ends = tuple(f"{head}{end}" for head in heads for end in (".weight", ".out_proj.weight"))
    return min((shape[0] for name, shape in shapes.items() if len(shape) == 2 and name.endswith(ends)), default=None)


def _config(adapter: Path) -> PeftConfig | None:
    """None for an adapter in our own format."""
    values = _object(adapter / CONFIG)
    if values is None and (adapter / CONFIG).exists():
        raise ValueError(f"{adapter / CONFIG} holds no JSON object: cut off, changed or foreign; save the adapter again")
    try:
        return PeftConfig.read_shared(values) if values else None
    except ValueError as error:
        raise ValueError(f"{adapter}: {error}") from None


def _read(path: Path) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Shapes of the tensors in a file, and what our metadata says; of a faulty one nothing, as loading says why."""
    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
            facts = json_text.parse((file.metadata() or {}).get("rankwise", "{}"))
    except (SafetensorError, OSError, ValueError):
        return {}, {}
    return shapes, facts if isinstance(facts, dict) else {}


def _object(path: Path) -> dict[str, Any] | None:
    try:
        value = json_text.read(path)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


@contextlib.contextmanager
def replaced(out: Path) -> Iterator[Path]:
    """A folder to write to that takes the place of `out`, an earlier export or nothing, when all went well."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (out.with_name(f".{out.name}.{word}") for word in ("new", "old"))
    for left in (partial, old):  # of an export that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        yield partial
        if out.exists():
            out.rename(old)
        partial.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)
