"""An adapter in Hugging Face's `Trainer`: a callback that drives it, and a hook on the model that adds its penalty.

    adapter.attach(model)
    optimizer = torch.optim.AdamW(variants.torch_groups(adapter, lr=1e-3, weight_decay=0.01))
    callback = variants.AdapterCallback(adapter)
    Trainer(model, args, train_dataset=data, optimizers=(optimizer, None), callbacks=[callback]).train()

Where the events of `Trainer._run_epoch` (transformers 5) fall into a step of `variants`:

    on_step_begin          which step it is, and that its first micro-batch comes
    model(...)             begin before the first of a micro-batch; its penalty after it (no event can change a loss)
    on_substep_end         the next micro-batch comes
    on_pre_optimizer_step  before_step: gradients are summed, unscaled and clipped
    on_optimizer_step      after_step: parameters are new, gradients are still there

The penalty enters once a step: with the first micro-batch where the model divides by the items of all of them (it was
given `num_items_in_batch`), with each where Trainer divides by their number.  Only its gradient enters, not its value, so
that the logged loss is the task's.

A checkpoint of Trainer's holds all that a resumed run needs, and is an adapter's folder: the files of `save_pretrained`, the
same once more in adapter/, and model.safetensors, which has what training moves: the adapter's state under "adapter_state.",
averages of the allocator among it, and the base's buffers.  `Trainer.save_model` writes the files of `save_pretrained`.  The
model's state has the base's own names, with the adapter's state beside them.

On several processes (torchrun, one GPU each) Trainer wraps the model in DistributedDataParallel, which averages the gradients
in the backward pass, so that clipping, importance and allocation see the same numbers in each, and all allocate alike.  A draw
of dropout is that of the row's place in the whole batch, as long as all processes pad to one length; the penalty enters once;
the first process writes.  Methods that give their tensors other sizes while they train are refused there, because
DistributedDataParallel sums gradients in buckets of the sizes that it began with.

What is not as in our own trainer, because Trainer decides it: a gradient that is not finite is skipped by fp16's
GradScaler alone (and then counts for no score); a model that takes `num_items_in_batch` without using it, as
transformers' classifiers with a loss of their own do, has under accumulation the sum of the micro-batches' losses, not
their mean, unless `model.accepts_loss_kwargs = False` is set before the Trainer is made.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rankwise.variants.adapter.groups import torch_groups
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.step import Step
from rankwise.variants.files.folders import placed
from rankwise.variants.files.pretrained import warn_if_unfinished, write
from rankwise.variants.files.state import ADAPTER_STATE, own_names
from rankwise.variants.lowrank.slots import follow
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback


class AdapterCallback(TrainerCallback):
    """Drives an attached adapter with one member through a `Trainer`."""

    def __init__(self, adapter: Adapter):
        """
        Raises:
            ValueError: several members, whose losses and clipping Trainer would pool; tensors that Trainer would neither
                clip nor clear; an adapter that is not attached.
        """
        if adapter.members > 1:
            raise ValueError(
                f"members = {adapter.members}: Trainer has one loss and one clipping norm for all rows: give one member"
            )
        if {id(p) for p in adapter.parameters()} - {id(p) for p in adapter.model.parameters()}:
            raise ValueError(
                f"{adapter.method} trains tensors that are not among the model's, so that Trainer neither clips nor clears "
                f"their gradients: give Trainer the model without an adapter, whose parameters it trains itself"
            )
        self.adapter = adapter
        self.step: Step | None = None  # None: nobody trains
        self.micro_batch = 0
        self.process, self.processes = 0, 1  # this one's number, and how many share each batch
        self._scaled_by = 1  # what Trainer multiplies a loss by that the model has divided by the items of all processes
        self._has_begun = False  # a second training pass of this micro-batch draws on
        self._losses: list[Tensor] = []  # of this step's micro-batches
        self._are_shares = False  # of the step's loss, which they add up to
        self._shows_wrappers = False
        model = adapter.model
        handles = [
            model.register_forward_pre_hook(self._before_forward),
            model.register_forward_hook(self._after_forward, with_kwargs=True),
            model.register_state_dict_post_hook(functools.partial(self._after_state)),  # it is given an attribute
            model.register_load_state_dict_pre_hook(self._before_load),
        ]
        for handle in handles:
            adapter.when_detached(handle.remove)

    # -- the events of Trainer -------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, **kwargs: Any) -> None:
        """
        Raises:
            ValueError: a model without this adapter, an optimizer that misses some of its parameters, or a way of training
                in which the adapter cannot be driven.
        """
        if model is not self.adapter.model:
            raise ValueError("the Trainer's model is not the one that the adapter is attached to: give it that one")
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process: an adapter is driven on one: start a process for each (torchrun "
                f"--nproc-per-node {args.n_gpu}), or show it one (CUDA_VISIBLE_DEVICES)"
            )
        if args.world_size > 1:
            self._check_processes(args)
        self.process, self.processes = args.process_index, args.world_size
        self._scaled_by = args.world_size if args.average_tokens_across_devices else 1
        if args.torch_compile:
            raise ValueError("torch_compile = True: the keys of one step would be compiled in: take it out")
        if getattr(args, "activation_checkpointing", False) or args.gradient_checkpointing:
            # The recomputation must draw the dropout that the first pass drew.
            keyed = {"use_reentrant": False, "context_fn": self.adapter.draw.recompute_contexts}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keyed)
        self.adapter.to(next(model.parameters()).device)  # its averages are not among the model's modules
        check_optimizer(optimizer, self.adapter)
        self._save_checkpoints(self._checkpoint)
        self._begin(state)

    def _check_processes(self, args: Any) -> None:
        """
        Raises:
            ValueError: several processes that share more than rows, or a method that they cannot share.
        """
        if args.fsdp or args.deepspeed:
            raise ValueError(
                "fsdp or deepspeed: they cut the adapter's tensors into pieces, and a method that allocates needs them whole: "
                "leave both out, so that each process has the model; torchrun -m rankwise compare shares a base that does not "
                "fit (training.shard_base)"
            )
        settings = self.adapter.settings
        resizing = "shrink = True" if getattr(settings, "shrink", False) else getattr(settings, "grows", False) and "growing"
        if resizing:
            raise ValueError(
                f"{self.adapter.method} ({resizing}) gives its tensors other sizes while it trains, and of {args.world_size} "
                f"processes DistributedDataParallel sums gradients of the sizes that it began with: train it in one process, "
                f"or with torchrun -m rankwise compare"
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin(state)

    def _begin(self, state: Any) -> None:
        self.step, self.micro_batch = Step(state.global_step + 1, state.max_steps), 0
        self._has_begun = False
        self._losses, self._are_shares = [], False

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.micro_batch += 1
        self._has_begun = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in self.adapter.parameters() if p.grad is not None]
        finite = torch.stack(torch._foreach_norm(gradients)).isfinite().all()
        if not finite:
            self.step = dataclasses.replace(self.step, taken=finite[None])
        if self._losses:
            losses = torch.stack(self._losses)
            loss = losses.sum() if self._are_shares else losses.mean()
            self.step = dataclasses.replace(self.step, losses=loss[None])
        self.adapter.before_step(self.step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
        if getattr(optimizer, "step_was_skipped", False):  # by fp16's GradScaler
            self.step = dataclasses.replace(self.step, taken=torch.zeros(1, dtype=torch.bool, device=self.adapter.device))
        rates = torch.tensor([rate_in_force(optimizer, self.adapter)], dtype=torch.float64, device=self.adapter.device)
        self.step = dataclasses.replace(self.step, learning_rates=rates)
        self.adapter.after_step(self.step)
        follow(optimizer, self.adapter)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:  # the first process; of several machines without a common disk the first of each
            write(self.adapter, Path(args.output_dir) / f"checkpoint-{state.global_step}" / "adapter")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.adapter.begin(self.step, training=False)
        self.step, self.adapter.draw.rows.before = None, 0
        self._save_checkpoints(None)
        warn_if_unfinished(self.adapter)  # the best checkpoint, where Trainer has loaded that, may be an early one

    # -- the hooks of the model --------------------------------------------------------------------------------------

    def _before_forward(self, model: nn.Module, args: tuple) -> None:
        if self.processes > 1 and self.step is not None:  # each has as many rows, which accelerate sees to
            rows = self.adapter.draw.rows
            rows.before = self.process * (rows.total or 0) if model.training else 0
        if self.step is not None and not (model.training and self._has_begun):
            self.adapter.begin(self.step, self.micro_batch, training=model.training)
            self._has_begun = model.training

    def _after_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """
        Raises:
            ValueError: a loss that the model does not make, so that no hook on the model can add to it.
        """
        if self.step is None or not model.training or not torch.is_grad_enabled():
            return None
        self._note_loss(output, kwargs.get("num_items_in_batch") is not None)
        if self.micro_batch and kwargs.get("num_items_in_batch") is not None:
            return None
        with torch.autocast(self.adapter.device.type, enabled=False):
            penalty = self.adapter.penalty(self.step).sum()
        if not penalty.requires_grad:  # a method without one
            return None
        loss = output.get("loss") if isinstance(output, dict) else output[0]
        if not isinstance(loss, Tensor) or loss.dim():
            raise ValueError(
                f"{type(model).__name__} returned no loss to add the penalty of {self.adapter.method} to: leave "
                f"label_smoothing_factor and compute_loss_func to models without an adapter, or set orthogonality = 0"
            )
        # Gradients are averaged over processes, so that each may add the whole penalty, unless Trainer scales the loss.
        share = penalty if kwargs.get("num_items_in_batch") is None else penalty / self._scaled_by
        loss = loss + (share - share.detach()).to(loss.dtype)
        if not isinstance(output, dict):
            return (loss, *output[1:])
        output["loss"] = loss
        return output

    def _note_loss(self, output: Any, is_share: bool) -> None:
        """Where the model makes the loss; a method that goes by the loss says so if it has none."""
        first = output[0] if isinstance(output, tuple) and output else None
        loss = output.get("loss") if isinstance(output, dict) else first
        if isinstance(loss, Tensor) and not loss.dim():
            self._losses.append(loss.detach().double())
            self._are_shares = is_share

    # -- the model's state and its files -----------------------------------------------------------------------------

    def _save_checkpoints(self, checkpoint: Callable[[Path], None] | None) -> None:
        door = getattr(self.adapter.model, "save_pretrained", None)  # Trainer calls it; a model not of transformers has none
        if door is not None:
            door.checkpoint = checkpoint

    def _checkpoint(self, folder: Path) -> None:
        """Writes what Trainer's `resume_from_checkpoint` and `load_best_model_at_end` read, and the adapter's files."""
        model = self.adapter.model
        places = own_names(model, dict(model.named_parameters(remove_duplicate=False)))
        frozen = {name for path, name in places.items() if not model.get_parameter(path).requires_grad}
        moved = {name: value.contiguous() for name, value in model.state_dict().items() if name not in frozen}
        write(self.adapter, folder)
        with placed(folder) as partial:
            save_file(moved, partial / "model.safetensors", metadata={"format": "pt"})

    def _after_state(self, model: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        """Gives the model's tensors their own names, and puts the adapter's beside them."""
        if self._shows_wrappers:
            return
        inside = {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
        state |= {prefix + name: inside[key] for key, name in own_names(model, inside).items()}
        state |= {f"{prefix}{ADAPTER_STATE}{name}": value for name, value in self.adapter.state_dict().items()}

    def _before_load(self, model: nn.Module, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Takes the adapter's state, which may bring sites of another size; what the state lacks stays as it is."""
        mark = prefix + ADAPTER_STATE
        trained = {key.removeprefix(mark): state.pop(key) for key in list(state) if key.startswith(mark)}
        if trained:
            self.adapter.load_state_dict(trained)
        self._shows_wrappers = True
        try:
            wrapped = model.state_dict()
        finally:
            self._shows_wrappers = False
        names = own_names(model, wrapped)
        for key, value in wrapped.items():
            state[prefix + key] = state.pop(prefix + names[key], value) if key in names else value


def rate_in_force(optimizer: Any, adapter: Adapter) -> float:
    """The rate that the optimizer has now, without the factors of the adapter's groups."""
    meant = torch_groups(adapter, lr=1.0)[0]
    first = meant["params"][0]
    now = next(group["lr"] for group in optimizer.param_groups if any(p is first for p in group["params"]))
    return float(now) / meant["lr"]


def check_optimizer(optimizer: Any, adapter: Adapter) -> None:
    """
    Raises:
        ValueError: an optimizer that misses some of the adapter's parameters, or trains them otherwise than the method means.
    """
    places = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    remedy = "give Trainer optimizers=(torch.optim.AdamW(variants.torch_groups(adapter, lr, weight_decay)), None)"
    missing = sum(id(p) not in places for p in adapter.parameters())
    if missing:
        raise ValueError(f"the optimizer misses {missing} parameters of {adapter.method}, as if made before attach: {remedy}")
    rates, decays = set(), set()
    for meant in torch_groups(adapter, lr=1.0, weight_decay=1.0):
        for place in (places[id(p)] for p in meant["params"]):
            rates.add(place.get("initial_lr", place["lr"]) / meant["lr"])
            decay = place.get("weight_decay", 0.0)
            decays |= {decay / meant["weight_decay"]} if meant["weight_decay"] else {"some"} if decay else set()
    if max(rates) > min(rates) * (1 + 1e-9):
        raise ValueError(f"the optimizer has not the rates that {adapter.method} means for its tensors: {remedy}")
    if len(decays) > 1:
        raise ValueError(f"the optimizer decays tensors that {adapter.method} does not, or not alike: {remedy}")
