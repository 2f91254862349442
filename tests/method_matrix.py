"""What each method can do, tried with the contract's own checks: `python -m tests.method_matrix [METHOD ...]` writes it down.

`rankwise list` shows the file, variants/settings/abilities.json; tests/test_method_matrix.py holds the two to each other.  An
ability that a method lacks is refused by it in one line, or an attribute of its class, which the checks go by.
"""

import contextlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from rankwise import variants
from rankwise.variants.files.state import has_low_rank_form
from rankwise.variants.settings import METHODS

from tests import contract
from tests.tiny import tiny

FILE = Path(variants.__file__).parent / "settings" / "abilities.json"


def packs(method: str) -> bool:
    """Members that train together end as each alone."""
    if contract.members_of(method) == 1:
        return False
    contract.packed_equals_alone(method)
    return True


def merges(method: str) -> bool:
    """Merged into the weights it gives the same outputs, and unmerging restores every bit."""
    if not contract.kind(method).mergeable:
        return False
    contract.merged_equals_unmerged(method)
    return True


def exports(method: str) -> bool:
    """`export_lora` writes a plain LoRA, of which PEFT's outputs are the same."""
    if not has_low_rank_form(contract.attached(method)):
        return False
    with tempfile.TemporaryDirectory() as folder:
        contract.peft_gives_the_same_output(method, Path(folder))
    return True


def has_pefts_files(method: str) -> bool:
    """What `save_pretrained` writes PEFT loads, with the same outputs."""
    with tempfile.TemporaryDirectory() as folder:
        contract.peft_gives_the_same_output(method, Path(folder))
        return (Path(folder) / "save_pretrained" / "adapter_config.json").is_file()


def resumes(method: str) -> bool:
    """A checkpoint gives the same next steps, to the bit."""
    contract.a_checkpoint_gives_the_same_next_steps(method)
    return True


def takes_a_quantised_base(method: str) -> bool:
    """Trains two steps over a base in 4 bits."""
    from tests.test_quantised import loaded

    try:
        adapter = contract.attach(contract.create(method), loaded("bert", "nf4"), contract.TARGETS)
    except ValueError:
        return False
    assert contract.losses(adapter, 2).isfinite().all()
    return True


def is_checkpointed(method: str) -> bool:
    """Gradient checkpointing changes no loss."""
    if not contract.kind(method).checkpointable:
        return False
    plain, recomputed = contract.attached(method), contract.attached(method)
    recomputed.model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(contract.losses(recomputed), contract.losses(plain), rtol=1e-12, atol=0)
    return True


def trains_under_trainer(method: str) -> bool:
    """Hugging Face's Trainer with the callback has the losses of the slow loop; two steps, before a size changes."""
    from tests.test_callback import CLIP, DECAY, RATE, STEPS, TorchsClip, batch, trainer

    def made() -> variants.Adapter:
        return contract.attach(contract.create(method, 1), tiny("bert"), contract.TARGETS)

    loop = TorchsClip(made(), RATE, STEPS, CLIP, DECAY)
    expected = [float(loop.step(batch(0, step))) for step in (1, 2)]
    seen: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = trainer(made(), Path(folder), max_steps=STEPS)
            run.train()
        except ValueError:
            return False
        seen = [line["loss"] for line in run.state.log_history if "loss" in line]
    assert len(seen) == STEPS
    torch.testing.assert_close(torch.tensor(seen[:2]), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    return True


ABILITIES: dict[str, Callable[[str], bool]] = {
    "packs": packs,
    "merges": merges,
    "exports as a LoRA": exports,
    "PEFT's files": has_pefts_files,
    "resumes to the bit": resumes,
    "quantised base": takes_a_quantised_base,
    "checkpointing": is_checkpointed,
    "Trainer": trains_under_trainer,
}


def abilities(method: str) -> dict[str, bool]:
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        return {name: tried(method) for name, tried in ABILITIES.items()}


def main(names: list[str]) -> None:
    known = json.loads(FILE.read_text("utf-8")) if FILE.is_file() else {}
    failed = []
    for name in names or METHODS:
        try:
            known[name] = abilities(name)
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    rows = [f" {json.dumps(name)}: {json.dumps(known[name])}" for name in METHODS if name in known]
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
