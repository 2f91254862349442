"""How fast this machine trains: products a second of one layer of the model, forward and backward, with an adapter on it."""

import statistics
import time
from typing import Any

import torch
from rankwise import variants
from rankwise.experiments.plan import shapes
from rankwise.experiments.plan.live import Taken
from rankwise.experiments.plan.step import Shape
from rankwise.experiments.training.evaluation import autocast
from rankwise.variants.adapter.step import Step

REPETITIONS = 3  # after one that is not timed
TOKENS = 512  # of all rows together, about
VOCABULARY = 1000  # embeddings are looked up, not multiplied
BY_LAYER = ("out_features", "out_indices", "stage_names")  # settings of a backbone that name layers, of which one is left
MOST_WEIGHTS = 4 << 30  # bytes; of a wider layer the rate is that of a plain product


def products_per_second(model: str, kind: Any, num_labels: int, shape: Shape, device: torch.device) -> float:
    """Products a second of a training step, on a model of one layer of this width whose values are random.

    shape: whose rows are as large, and whose precision counts.

    Raises:
        ValueError: the model's configuration is not at hand.
    """
    given = {key: value for key, value in shapes.configuration(model).items() if key not in BY_LAYER}
    given["num_hidden_layers"] = 1
    given |= {"vocab_size": VOCABULARY} if "vocab_size" in given else {}
    given |= {key: 0 for key in ("bos_token_id", "eos_token_id", "pad_token_id") if isinstance(given.get(key), int)}
    precision = shape.precision
    made = shapes.from_configuration(model, given, kind, num_labels, precision)
    if sum(p.numel() * p.element_size() for p in made.parameters()) > MOST_WEIGHTS:
        return _of_a_product(precision, device)
    made = made.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.02)
            else:
                tensor.zero_()
    adapter = variants.create("lora", rank=8)
    adapter.attach(made, head=kind.head_names(made))
    rows, size = max(1, TOKENS // shape.length), shape.size(kind)
    seconds, products = [], 0
    for repetition in range(REPETITIONS + 1):
        batch = {name: tensor.to(device) for name, tensor in kind.example(made.config, num_labels, rows, size).items()}
        labels = batch.pop("labels")
        made.train()
        adapter.begin(Step(repetition + 1, 10**6))

        def step(batch: Any = batch, labels: Any = labels) -> None:
            with autocast(device, precision):
                losses, _ = kind.example_losses(made, batch, labels, 1)
            losses.sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        if repetition == 0:
            with Taken() as taken:
                step()
            products = taken.products
            continue
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return products / statistics.median(seconds)


def _of_a_product(precision: str, device: torch.device) -> float:
    """Products a second of two square matrices."""
    size = 2048
    one = torch.randn(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    seconds = []
    for _ in range(REPETITIONS + 1):
        began = time.perf_counter()
        one @ one
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds[1:])
