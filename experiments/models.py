"""Pretrained models, ready for a task: loaded from safetensors alone, with a fresh head, without chatter.

`tiny` builds the five small random models that tests run on; no file is needed for them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rankwise.experiments import kinds, sources
from rankwise.experiments import quantization as quantized
from rankwise.experiments.config import Training
from rankwise.experiments.data.dataset import Dataset
from rankwise.variants.adapter.kinds.scheme import Scheme

HEAD_SEED = 0  # of the head that the loader makes; adapters start their own heads
POSITION_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")  # what transformers calls them
TINY = ("bert", "deberta-v2", "gpt2", "llama", "albert")


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a loaded model besides the model itself.

    heads: names of the modules made fresh for the task. attention: "sdpa" or "eager". content_hash: of its files.
    num_parameters: a quantised weight counts as the matrix that it holds.
    """

    id: str
    folder: Path
    content_hash: str
    heads: tuple[str, ...]
    attention: str
    precision: str
    num_parameters: int
    quantization: Scheme | None = None


def content_hash(model_id: str) -> str:
    """sha256 over config, tokenizer and weights of a model; for one of the catalogue known before any download."""
    return sources.content_hash(model_id)


def load(
    model_id: str,
    task: Any,
    precision: str = "fp32",
    device: str = "cpu",
    image_size: int | None = None,
    quantization: Scheme | None = None,
    heads: Sequence[str] | None = None,
) -> tuple[Any, Any, ModelInfo]:
    """A pretrained model with a head for `task`, its processor (of text: the tokenizer), and what is known of it.

    model_id: a name of the catalogue, a hub id, or a folder. task: its kind, num_labels and label_names are read; the names
    go into the model's configuration, and with it wherever the model is saved.
    precision: "fp32" or "bf16", of every tensor, the head's included. The model comes in evaluation mode.
    image_size: `Training.image_size`, in pixels.
    quantization: of the linears but for heads, poolers and output layers; None leaves the model as its files have it.
    heads: those that another process found when it loaded the model; this one then has shapes alone, on the meta device.
    Raises: Unavailable: no source could give it. ValueError: unknown precision, no such device, another kind of model, or no
    bitsandbytes for a quantised one.
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f'precision "{precision}" is not known; it must be fp32 or bf16')
    folder = sources.fetch(model_id)

    import safetensors
    import torch
    import transformers
    from rankwise.variants.adapter.kinds.quantised import scheme_of

    target = _device(device if heads is None else "meta")
    kind = kinds.get(task.kind)
    wanted = kind.model_settings(task.num_labels)
    names = getattr(task, "label_names", ())
    if names and wanted.get("num_labels") == len(names):
        wanted |= {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(HEAD_SEED)
        try:
            processor = kind.sized(kind.processor(folder), image_size)
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **wanted)
            auto = getattr(transformers, kind.model_class(config))
            kind.fit(processor, config)
            own = getattr(config, "quantization_config", None)
            if own is not None and quantization is not None:
                raise ValueError(f"its files are quantised already, and not to be quantised to {quantization}: leave that out")
            if own is not None and heads is not None:
                raise ValueError(
                    "its files are quantised, and training.shard_base = true cannot cut codes and their scales into parts: "
                    "take another model, or shard_base out"
                )
            options = {
                "config": config,
                "dtype": torch.float32 if precision == "fp32" else torch.bfloat16,
                "use_safetensors": True,
                "trust_remote_code": False,
                "local_files_only": True,
                "ignore_mismatched_sizes": True,  # a head of another width; anything else is refused below
                "output_loading_info": True,
            }
            if quantization is not None:
                with torch.device("meta"):
                    skipped = unquantised(auto.from_config(config), kind)
                options |= quantized.options(quantization, options["dtype"], target, skipped)
            elif own is not None:
                options["device_map"] = {"": str(target)}
            make = partial(auto.from_pretrained, folder) if heads is None else partial(_skeleton, auto)
            try:
                model, loading = make(attn_implementation="sdpa", **options)
            except (ValueError, ImportError) as error:
                if "scaled_dot_product_attention" not in str(error) and "sdpa" not in str(error).lower():
                    raise
                model, loading = make(attn_implementation="eager", **options)
        except (ValueError, KeyError, ImportError, OSError, RuntimeError, safetensors.SafetensorError) as error:
            raise ValueError(f"{model_id} cannot be loaded for {task.kind}: {_one_line(error)}") from error
    missing = [*loading["missing_keys"], *(key[0] if isinstance(key, tuple) else key for key in loading["mismatched_keys"])]
    heads = kind.head_names(model, missing) if heads is None else heads
    lacking = sorted(key for key in missing if not any(key.startswith(f"{head}.") for head in heads))
    if lacking:
        raise ValueError(
            f"{model_id} lacks {len(lacking)} weights of a {type(model).__name__}, {lacking[0]} among them: "
            "its files are of another model; nothing but a head or pooler is started at random"
        )
    model.files = folder  # for what starts at the weights before they were quantised (variants/weights/stored.py)
    model.config._name_or_path = model_id  # saved adapters name the model, not a folder of this machine's cache
    if own is None and quantization is None:
        model.to(target)
    else:
        quantized.finish(model)
    info = ModelInfo(
        id=model_id,
        folder=folder,
        content_hash=content_hash(model_id),
        heads=tuple(heads),
        attention=model.config._attn_implementation,
        precision=precision,
        num_parameters=_num_parameters(model),
        quantization=scheme_of(model),
    )
    return model, processor, info


def _skeleton(auto: Any, *, config: Any, dtype: Any, attn_implementation: str, **_: Any) -> tuple[Any, dict[str, list[str]]]:
    """The model in evaluation mode on the meta device, as if its files lacked nothing."""
    import torch

    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    return model.eval(), {"missing_keys": [], "mismatched_keys": []}


def unquantised(skeleton: Any, kind: Any) -> list[str]:
    """Modules that stay in floating point: the heads, which are trained, poolers, output layers and what is tied to them.

    skeleton: the model, of whatever values.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    poolers = [name for name, _ in skeleton.named_modules() if name.rpartition(".")[2] == "pooler"]
    return sorted({*get_keys_to_not_convert(skeleton), *kind.head_names(skeleton), *poolers})


def _num_parameters(model: Any) -> int:
    from rankwise.variants.adapter.kinds.quantised import bits

    packed = {id(m.weight): m.out_features * m.in_features for m in model.modules() if bits(m) is not None}
    return sum(packed.get(id(parameter), parameter.numel()) for parameter in model.parameters())


def longest_input(model: Any) -> int | None:
    """Tokens that the model's table of positions has rows for; without one what its configuration says, None if nothing.

    A table with a `padding_idx` (RoBERTa's kind, MPNet's) counts positions from the row after it; one with an `offset`
    (BART's) has so many rows before its first.
    """
    import torch

    words = None
    with suppress(NotImplementedError, AttributeError):  # what transformers' convolutional models raise
        words = model.get_input_embeddings()
    if not isinstance(words, torch.nn.Embedding):
        return None  # of images: its positions are no tokens
    lengths = [
        table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1) - getattr(table, "offset", 0)
        for name, table in model.named_modules()
        if name.rpartition(".")[2] in POSITION_TABLES and isinstance(table, torch.nn.Embedding)
    ]
    if lengths:
        return min(lengths)
    is_counted = getattr(model.config, "position_biased_input", True)  # False: DeBERTa's relative positions have no end
    return getattr(model.config, "max_position_embeddings", None) if is_counted else None


def unfit(model: Any, training: Training) -> list[str]:
    """What the training asks of this model that it cannot do."""
    faults, longest, patch = [], longest_input(model), getattr(model.config, "patch_size", None)
    if training.image_size is not None and isinstance(patch, int) and training.image_size % patch:
        near = patch * max(1, round(training.image_size / patch))
        faults.append(
            f"training.image_size = {training.image_size}: this model reads patches of {patch} pixels, and the rest would be "
            f"cut off: give a multiple, such as {near}"
        )
    if longest is not None and training.max_length > longest:
        faults.append(f"training.max_length = {training.max_length} is above the {longest} tokens this model takes: lower it")
    if training.gradient_checkpointing and not model.supports_gradient_checkpointing:
        faults.append(f"training.gradient_checkpointing: {type(model).__name__} does not support it: take it out")
    return faults


def beyond(model: Any, processor: Any, data: Mapping[str, Dataset]) -> list[str]:
    """Faults: tokens of the rows, or the padding token, that the model's embedding has no row for."""
    largest = max((found for part in data.values() if (found := part.largest_token) is not None), default=None)
    if largest is None:
        return []
    largest, rows = max(largest, processor.pad_token_id), model.get_input_embeddings().num_embeddings
    if largest < rows:
        return []
    name, token = model.config._name_or_path, processor.convert_ids_to_tokens(largest)
    return [
        f'{name}: its tokenizer has the token "{token}" (number {largest}), and its embedding {rows} rows: '
        f"save the model after resize_token_embeddings({len(processor)}), or take the token out of the tokenizer"
    ]


def tiny(
    name: str,
    num_labels: int = 3,
    dtype: str = "float32",
    seed: int = 0,
    dropout: float = 0.0,
    kind: str = "classification",
) -> Any:
    """A small random model with a head, in evaluation mode: the five that every packing test runs on.

    name: "bert", "deberta-v2" (share_att_key, relative attention), "gpt2" (Conv1D), "llama", "albert" (one layer,
    called again and again). hidden 32, 4 heads, 2 layers, vocabulary 67, at most 64 tokens, pad_token_id 0.
    dtype: "float32" or "float64". kind: a task's kind ("regression" wants num_labels=1, "span" 2).
    """
    if name not in TINY:
        raise ValueError(f'no tiny model "{name}"; there are {", ".join(TINY)}')
    import torch
    import transformers

    common = {"vocab_size": 67, "pad_token_id": 0, **kinds.get(kind).model_settings(num_labels)}
    encoder = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    if name == "bert":
        config = transformers.BertConfig(**common, **encoder)
    elif name == "deberta-v2":
        config = transformers.DebertaV2Config(
            **common,
            **encoder,
            type_vocab_size=0,
            relative_attention=True,
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            max_relative_positions=-1,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
            pooler_dropout=dropout,
        )
    elif name == "albert":
        config = transformers.AlbertConfig(**common, **encoder, embedding_size=16, classifier_dropout_prob=dropout)
    elif name == "gpt2":
        config = transformers.GPT2Config(
            **common,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_inner=48,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=1,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
        )
    else:
        config = transformers.LlamaConfig(
            **common,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=1,
            attention_dropout=dropout,
        )
    auto = getattr(transformers, kinds.get(kind).auto_class)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = auto.from_config(config)
        for parameter in model.parameters():  # biases and norms too: zeros and ones hide mistakes
            parameter.data.add_(0.05 * torch.randn(parameter.shape))
    return model.to(getattr(torch, dtype)).eval()


def tiny_tokenizer() -> Any:
    """A fast tokenizer for `tiny`: 67 tokens for letters, their continuations and digits; [CLS], [SEP] as in BERT."""
    import string

    import tokenizers
    import transformers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = list(string.ascii_lowercase)
    words = [*special, *letters, *(f"##{letter}" for letter in letters), *string.digits]
    vocabulary = {word: index for index, word in enumerate(words)}
    core = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    core.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, model_input_names=inputs, **names)


def _device(device: str) -> Any:
    import torch

    try:
        target = torch.device(device)
    except RuntimeError:
        raise ValueError(f'device "{device}" is not known; cpu and cuda are') from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'device "{device}": this machine has no CUDA device that torch can use; use cpu')
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(f'device "{device}": there are {torch.cuda.device_count()} CUDA devices, counted from 0')
    return target


@contextmanager
def quiet() -> Iterator[None]:
    """No load report, no progress bar, no advice from transformers, for the time being."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
