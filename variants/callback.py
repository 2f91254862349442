"""An adapter in Hugging Face's `Trainer`: a callback that drives it, and a hook on the model that adds its penalty.

    adapter.attach(model)
    optimizer = torch.optim.AdamW(variants.torch_groups(adapter, lr=1e-3, weight_decay=0.01))
    callback = variants.AdapterCallback(adapter)
    Trainer(model, args, train_dataset=data, optimizers=(optimizer, None), callbacks=[callback]).train()

Where the events of `Trainer._run_epoch` (transformers 5) fall into a step of `variants`:

    on_step_begin          which step it is, and that its first micro-batch comes
    model(...)             begin before it; its penalty after it (no event can change a loss)
    on_substep_end         the next micro-batch comes
    on_pre_optimizer_step  before_step: gradients are summed, unscaled and clipped
    on_optimizer_step      after_step: parameters are new, gradients are still there

The penalty enters once a step: with the first micro-batch where the model divides by the items of all of them (it was
given `num_items_in_batch`), with each where Trainer divides by their number.  Only its gradient enters, not its value, so
that the logged loss is the task's.

A checkpoint of Trainer's holds all that a resumed run needs: model.safetensors has the sites and, under "adapter_state.",
what the allocator averages; adapter/ beside it has the files of `save_pretrained`.

What is not as in our own trainer, because Trainer decides it: a gradient that is not finite is skipped by fp16's
GradScaler alone (and then counts for no score); a model that takes `num_items_in_batch` without using it, as
transformers' classifiers with a loss of their own do, has under accumulation the sum of the micro-batches' losses, not
their mean, unless `model.accepts_loss_kwargs = False` is set before the Trainer is made.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from rankwise.variants.base import Adapter, Step, torch_groups
from rankwise.variants.files.pretrained import save_pretrained
from rankwise.variants.lowrank import follow
from torch import Tensor, nn
from transformers import TrainerCallback

STATE = "adapter_state"  # name of the module under which the model's state holds what is in no site


class AdapterCallback(TrainerCallback):
    """Drives an attached adapter with one member through a `Trainer`."""

    def __init__(self, adapter: Adapter):
        """
        Raises:
            ValueError: several members, whose losses and clipping Trainer would pool; an adapter that is not attached.
        """
        if adapter.members > 1:
            raise ValueError(
                f"members = {adapter.members}: Trainer has one loss and one clipping norm for all rows: give one member"
            )
        self.adapter = adapter
        self.step: Step | None = None  # None: nobody trains
        self.micro_batch = 0
        model = adapter.model
        model.add_module(STATE, _State(adapter))
        handles = [
            model.register_forward_pre_hook(self._before_forward),
            model.register_forward_hook(self._after_forward, with_kwargs=True),
            model.register_load_state_dict_pre_hook(self._before_load),
        ]
        adapter.when_detached(lambda: [delattr(model, STATE), *(handle.remove() for handle in handles)])

    # -- the events of Trainer -------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, **kwargs: Any) -> None:
        """
        Raises:
            ValueError: a model without this adapter, an optimizer that misses some of its parameters, or a way of training
                in which the adapter cannot be driven.
        """
        if model is not self.adapter.model:
            raise ValueError("the Trainer's model is not the one that the adapter is attached to: give it that one")
        if args.world_size > 1 or args.n_gpu > 1:
            raise ValueError(f"{max(args.world_size, args.n_gpu)} processes or GPUs: an adapter is driven in one: show it one")
        if args.torch_compile:
            raise ValueError("torch_compile = True: the keys of one step would be compiled in: take it out")
        if getattr(args, "activation_checkpointing", False) or args.gradient_checkpointing:
            # The recomputation must draw the dropout that the first pass drew.
            keyed = {"use_reentrant": False, "context_fn": self.adapter.draw.recompute_contexts}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keyed)
        self.adapter.to(next(model.parameters()).device)  # its averages are not among the model's modules
        check_optimizer(optimizer, self.adapter)
        self._begin(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin(state)

    def _begin(self, state: Any) -> None:
        self.step, self.micro_batch = Step(state.global_step + 1, state.max_steps), 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.micro_batch += 1

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in self.adapter.parameters() if p.grad is not None]
        finite = torch.stack(torch._foreach_norm(gradients)).isfinite().all()
        if not finite:
            self.step = dataclasses.replace(self.step, taken=finite[None])
        self.adapter.before_step(self.step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
        if getattr(optimizer, "step_was_skipped", False):  # by fp16's GradScaler
            self.step = dataclasses.replace(self.step, taken=torch.zeros(1, dtype=torch.bool, device=self.adapter.device))
        rates = torch.tensor([rate_in_force(optimizer, self.adapter)], dtype=torch.float64, device=self.adapter.device)
        self.step = dataclasses.replace(self.step, learning_rates=rates)
        self.adapter.after_step(self.step)
        follow(optimizer, self.adapter)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        save_pretrained(self.adapter, Path(args.output_dir) / f"checkpoint-{state.global_step}" / "adapter")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.adapter.begin(self.step, training=False)
        self.step = None

    # -- the hooks of the model --------------------------------------------------------------------------------------

    def _before_forward(self, model: nn.Module, args: tuple) -> None:
        if self.step is not None:
            self.adapter.begin(self.step, self.micro_batch, training=model.training)

    def _after_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """
        Raises:
            ValueError: a loss that the model does not make, so that no hook on the model can add to it.
        """
        if self.step is None or not model.training or not torch.is_grad_enabled():
            return None
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
        loss = loss + (penalty - penalty.detach()).to(loss.dtype)
        if not isinstance(output, dict):
            return (loss, *output[1:])
        output["loss"] = loss
        return output

    def _before_load(self, model: nn.Module, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Takes the adapter's whole state out of the model's, which may bring sites of another size."""
        names = {id(module): name for name, module in model.named_modules()}
        found = {name.removeprefix(f"{STATE}."): value for name, value in state.items() if name.startswith(f"{STATE}.")}
        for key, kind in (("sites", self.adapter.sites), ("heads", self.adapter.heads)):
            for name, site in kind.items():
                place = f"{names[id(site)]}."
                mine = {k.removeprefix(place): v for k, v in state.items() if k.startswith(place)}
                found |= {f"{key}.{name}.{k}": v for k, v in mine.items()}
        if found:
            self.adapter.load_state_dict(found)


class _State(nn.Module):
    """Shows in a model's state what of its adapter's is in no site: the averages of scores."""

    def __init__(self, adapter: Adapter):
        super().__init__()
        self._adapter = [adapter]  # in a list, where it is no submodule: the sites are the model's already

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, value in self._adapter[0].state_dict(keep_vars=keep_vars).items():
            if not name.startswith(("sites.", "heads.")):
                destination[prefix + name] = value

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing: `AdapterCallback._before_load` has done it."""


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
