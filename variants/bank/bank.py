"""Many trained adapters on one frozen model, switched, mixed in one batch, and combined, without loading the model again.

    bank = variants.Bank(model)
    bank.load("legal", folder); bank.load("code", other)        # PEFT's folders or ours
    bank.use("legal")                                           # for every row from now on; use(None): the frozen model
    bank(batch, adapters=["legal", None, "code", "legal"])      # one forward pass, a row with each
    bank.generate(batch, adapters=[...], max_new_tokens=64)
    bank.combine({"legal": 0.7, "code": 0.3}, how="linear").save(folder)
    bank.remove("code")                                         # bit for bit the model itself when all are gone

A bank answers; it does not train.  No dropout of an adapter acts in it, whatever mode the model is in.  Calls from several
threads wait for one another.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.variants.adapter import experts
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.linears import prepare
from rankwise.variants.adapter.rows import count_rows
from rankwise.variants.adapter.site import Site
from rankwise.variants.adapter.surgery import Adapted, Surgery
from rankwise.variants.adapter.targets import unwrapped
from rankwise.variants.bank.combine import How, combined
from rankwise.variants.bank.owners import Owners
from rankwise.variants.bank.saving import Combination
from rankwise.variants.bank.site import BankSite, part_of
from rankwise.variants.files.doors import close_door
from rankwise.variants.files.pretrained import load_pretrained
from rankwise.variants.settings import nearest
from torch import Tensor, nn


class Bank:
    """Adapters by name over one model.

    model: what is called in the end; `model(**batch)` itself answers with the adapter that `use` named.
    """

    def __init__(self, model: nn.Module):
        """
        Raises:
            ValueError: a model that has an adapter, or is wrapped for several devices.
        """
        self.model = unwrapped(model)
        if any(isinstance(module, Adapted) for module in self.model.modules()):
            raise ValueError(
                f"{type(self.model).__name__} has an adapter already: detach it first, and load it from its folder"
            )
        self._adapters: dict[str, Adapter] = {}
        self._owners = Owners()
        self._surgery: Surgery | None = None
        self._lock = threading.RLock()

    @property
    def names(self) -> list[str]:
        """Of the adapters that are loaded, in the order of loading."""
        return list(self._adapters)

    @property
    def active(self) -> str | None:
        """The adapter of every row, where a call does not say otherwise; None: the frozen model alone."""
        return self._owners.active

    # -- loading -----------------------------------------------------------------------------------------------------

    def load(self, name: str, folder: str | Path) -> None:
        """Loads the adapter in `folder`, ours or PEFT's, under this name.  `use` does not change.

        Raises:
            ValueError: a name that is taken or empty, or an adapter that cannot stand beside others: it trains the model's own
                tensors, or comes with tensors of the base; and as `load_pretrained`.  The bank is then as it was.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"name = {name!r}: an adapter in a bank is named by a text that is not empty")
        with self._lock:
            if name in self._adapters:
                raise ValueError(f'"{name}" is loaded already: call remove("{name}") first, or load it under another name')
            with self._taken_out():
                adapter = load_pretrained(self.model, folder)
                fault = _fault(adapter)
                adapter.detach()
                if fault is not None:
                    raise ValueError(f"{folder}: {fault}")
                adapter.eval()
                self._adapters[name] = adapter

    def remove(self, name: str) -> None:
        """Forgets the adapter of that name; if it was in use, the frozen model alone is.

        Raises:
            ValueError: no adapter has that name.
        """
        with self._lock:
            self._check([name])
            with self._taken_out():
                del self._adapters[name]
                if self.active == name:
                    self._owners.active = None

    def use(self, name: str | None) -> None:
        """Every row has this adapter from now on, or, of None, the frozen model alone.

        Raises:
            ValueError: no adapter has that name.
        """
        with self._lock:
            self._check([name])
            self._owners.active = name

    @contextlib.contextmanager
    def _taken_out(self) -> Iterator[None]:
        """While the model is bit for bit itself, so that adapters can come and go."""
        if self._surgery is not None:
            self._surgery.undo()
            self._surgery = None
        try:
            yield
        finally:
            if self._adapters:
                self._put_in()

    def _put_in(self) -> None:
        sites: dict[str, dict[str, Site]] = {}
        for adapter_name, adapter in self._adapters.items():
            for name, site in _sites_of(adapter):
                sites.setdefault(name, {})[adapter_name] = site
        surgery = Surgery(self.model)
        try:
            surgery.freeze()
            surgery.keep_from_fusing()
            for undo in prepare(self.model):
                surgery.undo_too(undo)
            surgery.watch_rows(self._owners)
            for name, here in sites.items():
                base = self.model.get_submodule(name)
                parts = {adapter: part_of(site, base) for adapter, site in here.items()}
                surgery.replace(name, Adapted(base, BankSite(name, self._owners, parts).eval()).train(base.training))
            if hasattr(self.model, "save_pretrained"):
                self.model.save_pretrained = _refuse_to_save
                surgery.undo_too(functools.partial(close_door, self.model))
        except BaseException:
            surgery.undo()
            raise
        self._surgery = surgery

    # -- answering ---------------------------------------------------------------------------------------------------

    def __call__(self, batch: Any, adapters: Sequence[str | None] | None = None, **arguments: Any) -> Any:
        """The model's output for a batch (a mapping, a tuple or a tensor), with an adapter for each row.

        Args:
            adapters: of each row the name of its adapter, or None for the frozen model; in any order.  All rows have the one
                in use, if not given.
            arguments: more of what the model takes.

        Raises:
            ValueError: a name that is not loaded, as many names as there are no rows, or an adapted module whose input is not
                the batch's rows.
        """
        with self._rows_of(batch, adapters):
            if isinstance(batch, Mapping):
                return self.model(**batch, **arguments)
            return self.model(*(batch if isinstance(batch, tuple | list) else (batch,)), **arguments)

    def generate(self, batch: Any, adapters: Sequence[str | None] | None = None, **arguments: Any) -> Any:
        """What `model.generate` gives for the batch (a mapping or a tensor of token ids), with an adapter for each row.

        Raises:
            ValueError: as a call, and for a model that does not generate.
        """
        if not hasattr(self.model, "generate"):
            raise ValueError(f"{type(self.model).__name__} has no generate: give a language model of transformers")
        with self._rows_of(batch, adapters):
            return self.model.generate(**({**batch} if isinstance(batch, Mapping) else {"inputs": batch}), **arguments)

    @contextlib.contextmanager
    def mixed(self, adapters: Sequence[str | None] | None) -> Iterator[None]:
        """While it is open, the rows of what `bank.model` is called with have these adapters; None: all have the one in use.

        For loops of one's own around the model.  Others wait that long.

        Raises:
            ValueError: a name that is not loaded.
        """
        with self._lock:
            if adapters is None:
                yield
                return
            if isinstance(adapters, str):
                raise ValueError(
                    f'adapters = "{adapters}": give a list, a name or None for each row; or bank.use("{adapters}")'
                )
            self._check(list(adapters))
            self._owners.mix(adapters)
            try:
                yield
            finally:
                self._owners.mix(None)

    @contextlib.contextmanager
    def _rows_of(self, batch: Any, adapters: Sequence[str | None] | None) -> Iterator[None]:
        with self.mixed(adapters):
            if adapters is not None:
                is_named = isinstance(batch, Mapping)
                positions = () if is_named else (batch,) if isinstance(batch, Tensor) else tuple(batch)
                rows = count_rows(positions, batch if is_named else {})
                if rows is None or len(adapters) != rows:
                    raise ValueError(
                        f"adapters has {len(adapters)} names, and the batch {rows} rows: give one for each, or None"
                    )
            yield

    # -- combining ---------------------------------------------------------------------------------------------------

    def combine(
        self,
        weights: Mapping[str, float],
        how: How = "linear",
        *,
        rank: int | None = None,
        density: float | None = None,
        seed: int = 0,
    ) -> Combination:
        """One adapter out of several, whose change of each weight is a weighted sum of theirs; `.save(folder)` writes it.

        "linear" and "concatenate" are exact (combine.py says what differs), and so is any `how` where one weight alone is not
        0.  Of the others the result says its `error`.  Task heads are summed in the same way, whatever `how` says.

        Args:
            weights: of each adapter its weight, which may be negative; the sum need not be 1.
            rank: of "svd", "ties" and "dare", at every site; the largest of the adapters' there, if not given.
            density: the share of entries that "ties" keeps (0.2 if not given: Yadav et al., sec. 5) or "dare" does not drop
                (1 - p; 0.5 if not given).
            seed: of what "dare" drops.

        Raises:
            ValueError: a name that is not loaded, a weight that is no finite number, an unknown `how`, an argument without
                effect, or an adapter whose change is no low-rank one.
        """
        with self._lock:
            self._check(list(weights))
            with self._taken_out():
                adapters = {name: self._adapters[name] for name in weights}
                result = combined(self.model, adapters, weights, how, rank=rank, density=density, seed=seed)
        return Combination(self.model, result, self._locked_out)

    @contextlib.contextmanager
    def _locked_out(self) -> Iterator[None]:
        with self._lock, self._taken_out():
            yield

    def _check(self, names: Sequence[str | None]) -> None:
        for name in names:
            if name is not None and name not in self._adapters:
                there = ", ".join(self._adapters) or "none"
                raise ValueError(f'no adapter "{name}" in this bank{nearest(str(name), self.names)}; loaded: {there}')


def _refuse_to_save(*_: Any, **__: Any) -> None:
    """In the place of the model's save_pretrained, which would write the names of wrapped modules."""
    raise ValueError(
        "this model holds a bank of adapters: remove them first to save the model itself, or write several adapters as one "
        "with bank.combine(...).save(folder)"
    )


def _sites_of(adapter: Adapter) -> Iterator[tuple[str, Site]]:
    """(module name, site) of everything that an adapter puts into a model, its heads too."""
    yield from adapter.named_sites()
    yield from adapter.named_heads()


def _fault(adapter: Adapter) -> str | None:
    """Why an adapter cannot stand beside others on one model, and the remedy; None where it can."""
    if adapter.trains_base:
        return (
            f"{adapter.method} changes the model's own tensors, which other rows need as they are: use the model it makes alone"
        )
    if adapter.adds_tokens:
        return f"{adapter.method} puts tokens before every row: use it alone (variants.load_pretrained)"
    if any(experts.is_expert(adapter.base(name)) for name, _ in adapter.named_sites()):
        return "it changes experts, whose tokens are of many rows: use it alone (variants.load_pretrained)"
    if adapter.base_tensors:
        return (
            f"it comes with {next(iter(adapter.base_tensors))} of the base, which other rows need as it is: "
            f"put that into the model first, or use this adapter alone (variants.load_pretrained)"
        )
    return None
