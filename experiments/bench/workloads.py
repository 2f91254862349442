"""What the arms work on: a model with a head at some shape (`EncoderArms`), or one linear (`LinearArms`)."""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rankwise import variants
from rankwise.experiments import models, sources
from rankwise.experiments.bench import timing
from rankwise.experiments.bench.arms import TASK, Floor, ImprovedFloor, Ours, OursAlone, Peft, Setup, trainer
from rankwise.experiments.bench.cases import LINEAR_SIZES, RECIPE, TOTAL_STEPS, ImageSize, LlamaSize, Shape, settings
from rankwise.experiments.data.encoded import Encoded
from rankwise.experiments.data.images import Images
from rankwise.experiments.tasks import Task
from rankwise.experiments.tasks import get as get_task
from rankwise.variants.adapter.targets import resolve
from torch import Tensor, nn
from transformers.utils import ModelOutput

PRECISIONS = ("fp32", "bf16 weights", "bf16 autocast")  # what PEFT can be run in
POOL = 8  # batches of random rows that the steps draw from


class Arms:
    """The arms of one workload, each made once, when it is first asked for.

    batches: forward passes of one timed evaluation; of a training step one.
    """

    name: str  # of one member's batch, which is all that PEFT sees
    improved_floor: Floor | None = None

    def __init__(self, setup: Setup, shape: Shape):
        self.setup, self.shape, self.members = setup, shape, shape.members
        self.batches = {"train": 1, "eval": shape.evaluation_batches}
        self._made: dict[tuple[str, ...], Any] = {}

    def ours(self, method: str) -> Any:
        return self._once(("ours", method), lambda: self._ours(method))

    def peft(self, method: str, precision: str) -> Peft:
        return self._once(("peft", method, precision), lambda: self._peft(method, precision))

    def cached_peft(self, method: str, precision: str) -> Peft:
        """One of its own: an evaluation without the cache would empty it."""
        return self._once(("cached", method, precision), lambda: self._peft(method, precision))

    def forget_peft(self, precision: str) -> None:
        """Frees what was made of PEFT in this precision."""
        for key in [key for key in self._made if key[0] == "peft" and key[2] == precision]:
            del self._made[key]

    def _once(self, key: tuple[str, ...], make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class EncoderArms(Arms):
    """The arms over one model with a head, at one shape.

    task: whose kind and labels the random rows are of. task_type: PEFT's word for it.
    """

    task = TASK
    task_type: str | None = "SEQ_CLS"

    def __init__(self, setup: Setup, model: str, shape: Shape):
        super().__init__(setup, shape)
        self.model = model
        self.name = f"{Path(model).name} {shape.rows} x {shape.length}"
        self.rows = self.random_rows(POOL * shape.rows)

    def random_rows(self, count: int) -> Any:
        return random_rows(self.model, count, self.shape.length)

    def plain(self, precision: str, device: torch.device) -> tuple[nn.Module, list[str], list[str]]:
        return plain(self.model, precision, device, self.task)

    @cached_property
    def floor(self) -> Floor:
        model, _, targets = self.plain(self.setup.precision, self.setup.device)
        return Floor(model, targets, self.tensors(model.dtype, self.members), self.shape.evaluation_batches)

    @cached_property
    def improved_floor(self) -> ImprovedFloor:
        made = trainer("head", self.setup, self.model, self.shape, self.rows, self.task)
        targets = self.plain("fp32", torch.device("cpu"))[2]
        return ImprovedFloor(made, targets, self.tensors(torch.float32, self.members), self.shape.evaluation_batches)

    def floor_flops(self, phase: str) -> int:
        """Operations of the floor's matrix products, for all members, in one step or batch: they grow with the rows alone."""
        model, _, targets = self.plain("fp32", self.setup.device)
        one = Floor(model, targets, {k: v[:1] for k, v in self.tensors(torch.float32, 1).items()})
        return timing.flops(one.train if phase == "train" else one.evaluate) * self.shape.rows * self.members

    def tensors(self, dtype: torch.dtype, members: int = 1, batch: int = 0) -> dict[str, Tensor]:
        """So many members' batches, one after the other, from `batch` of the pool on; labels in the model's own precision."""
        n, length = self.shape.rows * members, self.shape.length
        rows = self.rows.select((np.arange(n) + batch * self.shape.rows) % len(self.rows))
        ids = torch.from_numpy(rows.ids.astype(np.int64)).view(n, length)
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.from_numpy(rows.labels).to(dtype)}
        if rows.token_type_ids is not None:
            found["token_type_ids"] = torch.zeros_like(ids)
        return {name: tensor.to(self.setup.device) for name, tensor in found.items()}

    def _ours(self, method: str) -> Ours:
        return Ours(method, self.setup, self.model, self.shape, self.rows, self.task)

    def _peft(self, method: str, precision: str) -> Peft:
        model, heads, targets = self.plain("bf16" if precision == "bf16 weights" else "fp32", self.setup.device)
        config = peft_config(method, targets, {}, modules_to_save=heads, task_type=self.task_type)
        inputs = [self.tensors(model.dtype, batch=i) for i in range(POOL)]
        made = Peft(model, config, method, precision, inputs, self.setup.device)
        made.batches = self.shape.evaluation_batches
        return made


class RandomImages(Images):
    """Pixels that are there already, (n, 3, H, W) bytes."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray):
        self.pixels, self.labels = pixels, labels
        self.scale, self.offset = np.float32(1 / 58), np.float32(-2.1)  # about ImageNet's

    def select_examples(self, examples: Any) -> "RandomImages":
        return RandomImages(self.pixels[examples], self.labels[examples])


class ImageArms(EncoderArms):
    """The arms over a classifier of images, of random bytes."""

    task, task_type = get_task("fashion-mnist"), None

    def __init__(self, setup: Setup, model: str, shape: Shape, side: int):
        self.side = side
        super().__init__(setup, model, shape)

    def random_rows(self, count: int) -> RandomImages:
        random = np.random.default_rng(0)
        pixels = random.integers(0, 256, (count, 3, self.side, self.side), dtype=np.uint8)
        return RandomImages(pixels, random.integers(0, self.task.num_labels, count))

    def tensors(self, dtype: torch.dtype, members: int = 1, batch: int = 0) -> dict[str, Tensor]:
        n = self.shape.rows * members
        chosen = (np.arange(n) + batch * self.shape.rows) % len(self.rows)
        pixels = torch.from_numpy(self.rows.pixels[chosen] * self.rows.scale + self.rows.offset).to(dtype)
        found = {"pixel_values": pixels, "labels": torch.from_numpy(self.rows.labels[chosen])}
        return {name: tensor.to(self.setup.device) for name, tensor in found.items()}


def plain(model_id: str, precision: str, device: torch.device, task: Task = TASK) -> tuple[nn.Module, list[str], list[str]]:
    """The model as the hub gives it, without attention dropout; names of its heads, names of the linears to adapt."""
    model, _, info = models.load(model_id, task, precision, str(device))
    model.config.attention_probs_dropout_prob = model.config.attention_dropout = 0.0
    for name, module in model.named_modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
        if name.endswith("attention.self") and isinstance(getattr(module, "dropout", None), nn.Dropout):
            module.dropout.p = 0.0
    return model, list(info.heads), resolve(model, RECIPE["targets"], info.heads)


def peft_config(method: str, targets: list[str], sizes: dict[str, Any], **further: Any) -> Any:
    """PEFT's configuration of what `settings` says in our words."""
    import peft

    ours = settings(method, sizes)
    common = {"target_modules": targets, "lora_dropout": ours["dropout"], "lora_alpha": ours["alpha"], **further}
    if method == "adalora":
        return peft.AdaLoraConfig(
            init_r=ours["initial_rank"],
            target_r=ours["target_rank"],
            orth_reg_weight=ours["orthogonality"],
            deltaT=ours["interval"],
            tinit=ours["warmup_steps"],
            tfinal=ours["final_steps"],
            total_step=TOTAL_STEPS,
            **common,
        )
    return peft.LoraConfig(r=ours["rank"], use_dora=method == "dora", **common)


def random_rows(model_id: str, rows: int, length: int) -> Encoded:
    """Rows of exactly `length` random tokens, none of them special, with random scores."""
    random = np.random.default_rng(0)
    ids = random_ids(model_id, rows, length, random)
    types = np.zeros(rows * length, np.int8) if _config(model_id).get("type_vocab_size") else None
    labels = random.random(rows, dtype=np.float32)
    return Encoded(ids, np.arange(0, rows * length + 1, length, dtype=np.int64), types, labels, max(length, 8))


def random_ids(model_id: str, rows: int, length: int, random: np.random.Generator | None = None) -> np.ndarray:
    """(rows * length,) int32, none of them a special token."""
    size = _config(model_id)["vocab_size"]
    random = np.random.default_rng(0) if random is None else random
    return random.integers(min(1000, size // 8), size, rows * length, dtype=np.int32)


def _config(model_id: str) -> dict[str, Any]:
    return json.loads((sources.fetch(model_id) / "config.json").read_text(encoding="utf-8"))


@contextlib.contextmanager
def llama(
    size: LlamaSize, scratch: Path, precision: str, positions: int, name: str = "Llama shape", head: bool = False
) -> Iterator[str]:
    """The id (a folder) of a random model of that size; gone afterwards. head: with an output layer, tied to its embeddings."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        intermediate_size=size.feed_forward,
        max_position_embeddings=positions,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        tie_word_embeddings=head,
    )
    auto = transformers.AutoModelForCausalLM if head else transformers.AutoModel
    with tempfile.TemporaryDirectory(dir=scratch) as parent:
        folder = str(Path(parent) / name)
        with models.quiet(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = auto.from_config(config, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
            model.save_pretrained(folder)
            tokenizer = models.tiny_tokenizer()
            tokenizer.eos_token = tokenizer.sep_token  # which language models must have
            tokenizer.save_pretrained(folder)
            del model
        yield folder


@contextlib.contextmanager
def dinov2(size: ImageSize, scratch: Path) -> Iterator[str]:
    """The id (a folder) of a random DINOv2 of that size, with its image processor; gone afterwards."""
    import transformers

    config = transformers.Dinov2Config(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        patch_size=size.patch,
        image_size=size.side,
    )
    with tempfile.TemporaryDirectory(dir=scratch) as parent:
        folder = str(Path(parent) / "DINOv2 shape")
        with models.quiet(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            transformers.AutoModel.from_config(config).save_pretrained(folder)
            transformers.BitImageProcessorPil(crop_size={"height": size.side, "width": size.side}).save_pretrained(folder)
        yield folder


# -- one linear --------------------------------------------------------------------------------------------------------


class OneLinear(nn.Module):
    """A linear and the mean square of its output as the loss."""

    def __init__(self, features: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.linear = nn.Linear(features, features)

    def forward(self, x: Tensor) -> ModelOutput:
        output = self.linear(x)
        return ModelOutput(loss=output.float().square().mean(), logits=output)


class LinearArms(Arms):
    """The arms over one linear with bias, K = 1; its input needs a gradient, as inside a model."""

    def __init__(self, setup: Setup, shape: Shape, features: int):
        super().__init__(setup, shape)
        self.features = features
        self.name = f"linear {features} x {features}"

    @cached_property
    def floor(self) -> Floor:
        model = self._module(self.setup.precision)
        return Floor(model, [], {"x": self._x(model.linear.weight.dtype)}, self.shape.evaluation_batches)

    def floor_flops(self, phase: str) -> int:
        floor = Floor(self._module("fp32"), [], {"x": self._x(torch.float32)})
        return timing.flops(floor.train if phase == "train" else floor.evaluate)

    def _module(self, precision: str) -> OneLinear:
        return OneLinear(self.features).to(self.setup.device, torch.bfloat16 if precision == "bf16" else torch.float32)

    def _x(self, dtype: torch.dtype) -> Tensor:
        random = torch.Generator().manual_seed(0)
        x = torch.randn(self.shape.rows * self.shape.length, self.features, generator=random).to(self.setup.device, dtype)
        return x.requires_grad_()

    def _ours(self, method: str) -> OursAlone:
        model = self._module(self.setup.precision)
        adapter = variants.create(method, **settings(method, LINEAR_SIZES)).attach(model, ["linear"], head=[])
        x = self._x(model.get_submodule("linear").weight.dtype)
        return OursAlone(adapter, x, self.setup.precision, self.shape.evaluation_batches)

    def _peft(self, method: str, precision: str) -> Peft:
        model = self._module("bf16" if precision == "bf16 weights" else "fp32")
        inputs = [{"x": self._x(model.linear.weight.dtype)}]
        made = Peft(model, peft_config(method, ["linear"], LINEAR_SIZES), method, precision, inputs, self.setup.device)
        made.batches = self.shape.evaluation_batches
        return made
