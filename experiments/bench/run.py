"""The rows of the JSON: which arms run beside each other, and what is made of their times."""

import contextlib
import gc
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rankwise.experiments import measure, memory
from rankwise.experiments.bench import throughput, timing
from rankwise.experiments.bench.arms import Setup
from rankwise.experiments.bench.cases import PEFT_METHODS, RECIPE, TARGETS, Case, Plan, of_group
from rankwise.experiments.bench.language import LanguageArms
from rankwise.experiments.bench.workloads import PRECISIONS, Arms, EncoderArms, ImageArms, LinearArms, dinov2, llama

SCHEMA = 1
OF_PEFT = ("peft", "cached", "merged")  # arms that train or evaluate one member
CLOSE = 1.3  # PEFT's precisions within this factor of its best are timed for every method
HOPELESS = 2.0  # one that is slower by this factor is given up after its second step, by its square after its first


class Bench:
    """One process in which everything is measured.

    Args:
        chosen: the cases to measure.
        repetitions: timed rounds, instead of each shape's own number.
        say: called with a line for each case that is done.
        progress: called with (what is running, cases done since the last call, in parts).
    """

    def __init__(
        self,
        plan: Plan,
        device: torch.device,
        chosen: Sequence[Case],
        repetitions: int | None = None,
        say: Callable[[str], None] = lambda line: None,
        progress: Callable[[str, float], None] = lambda what, cases: None,
    ):
        self.plan, self.chosen, self.repetitions, self.say, self.progress = plan, list(chosen), repetitions, say, progress
        self.device, self.precision = device, measure.precision("auto", device)
        self.targets = TARGETS[device.type]
        self.found: dict[str, Any] = {"rows": [], "allocator": [], "throughput": [], "study": None, "failures": []}
        self.peft_precisions: dict[str, dict[str, float]] = {}  # workload -> precision -> seconds of a step

    def run(self) -> dict[str, Any]:
        """Everything that was chosen, as it is written to the JSON file."""
        with tempfile.TemporaryDirectory(prefix="rankwise-bench-") as scratch:
            self.setup = Setup(self.device, self.precision, Path(scratch))
            self.machine = machine(self.device, self.precision, self.plan.products)
            for shape in self.plan.shapes:
                rows, allocator = of_group(self.chosen, "encoder", shape.name), of_group(self.chosen, "allocator", shape.name)
                if rows or allocator:
                    with self._going_on(rows or allocator):
                        self._measure(EncoderArms(self.setup, self.plan.model, shape), rows, allocator)
            if rows := of_group(self.chosen, "linear"):
                with self._going_on(rows):
                    self._measure(LinearArms(self.setup, self.plan.linear, self.plan.features), rows)
            if rows := of_group(self.chosen, "llama"):
                shape = self.plan.llama_shape
                with self._going_on(rows), llama(self.plan.llama, Path(scratch), self.precision, 2 * shape.length) as model:
                    self._measure(EncoderArms(self.setup, model, shape), rows)
            if rows := of_group(self.chosen, "images"):
                shape, size = self.plan.images_shape, self.plan.images
                with self._going_on(rows), dinov2(size, Path(scratch)) as model:
                    self._measure(ImageArms(self.setup, model, shape, size.side), rows)
            if rows := of_group(self.chosen, "language"):
                shape = self.plan.language_shape
                made = llama(self.plan.language, Path(scratch), self.precision, 2 * shape.length, "SmolLM2 shape", head=True)
                with self._going_on(rows), made as model:
                    self._measure(LanguageArms(self.setup, model, shape), rows)
            self._clean()
            for case in of_group(self.chosen, "throughput"):
                with self._going_on([case]):
                    self.found["throughput"].append(self._throughput(case))
            if cases := of_group(self.chosen, "study"):
                with self._going_on(cases):
                    self._study()
        return {
            "schema": SCHEMA,
            "machine": self.machine,
            "recipe": RECIPE,
            "peft_precisions": self.peft_precisions,
            **self.found,
        }

    @contextlib.contextmanager
    def _going_on(self, cases: Sequence[Case]) -> Iterator[None]:
        """What fails, for want of memory above all, is said, written down, and does not cost what was measured before."""
        try:
            yield
        except Exception as error:
            line = (str(error).splitlines() or [""])[0][:200]
            self.found["failures"].append({"cases": [case.name for case in cases], "error": f"{type(error).__name__}: {line}"})
            self.say(f"{cases[0].name} and what is measured with it failed: {type(error).__name__}: {line}")
        self._clean()

    # -- steps and evaluations ---------------------------------------------------------------------------------------

    def _measure(self, arms: Arms, rows: Sequence[Case], allocator: Sequence[Case] = ()) -> None:
        for phase in ("train", "eval"):
            if cases := [case for case in rows if case.phase == phase]:
                self.found["rows"] += self._rows(arms, phase, cases)
        for case in allocator:
            self.found["allocator"].append(self._allocator(arms, case))
        self._clean()

    def _rows(self, arms: Arms, phase: str, cases: Sequence[Case]) -> list[dict[str, Any]]:
        methods = {case.method: case.name for case in cases}
        precisions = self._worth_trying(arms)
        steps: dict[tuple[str, ...], Callable[[], None]] = {}
        for method in methods:
            steps["ours", method] = _step(arms.ours(method), phase)
            for precision in precisions if method in PEFT_METHODS else ():
                steps["peft", method, precision] = _step(arms.peft(method, precision), phase)
                if phase == "eval":
                    steps["merged", method, precision] = arms.peft(method, precision).evaluate_merged
                if (phase, method) == ("eval", "dora"):
                    steps["cached", method, precision] = arms.cached_peft(method, precision).evaluate_cached
        steps["floor",] = _step(arms.floor, phase)
        if arms.improved_floor is not None:
            steps["improved floor",] = _step(arms.improved_floor, phase)
        repeat = {key: arms.shape.peft_repeat for key in steps if key[0] in OF_PEFT}
        what = f"{cases[0].name} and {len(cases) - 1} more" if len(cases) > 1 else cases[0].name
        shape = arms.shape
        rounds = self.repetitions or (phase == "eval" and shape.evaluation_repetitions) or shape.repetitions
        done = lambda share: self.progress(what, share * len(cases))  # noqa: E731
        warmup = 1 if phase == "eval" else shape.warmup  # an evaluation is several batches
        times = timing.interleave(steps, self.device, rounds, warmup, repeat, done)
        for key, taken in times.items():  # seconds per member and batch; PEFT trains one member
            members = 1 if key[0] in OF_PEFT else arms.members
            times[key] = [t / members / arms.batches[phase] for t in taken]
        flops = arms.floor_flops(phase) / arms.members
        rows = [self._row(arms, phase, method, name, times, flops) for method, name in methods.items()]
        for row in rows:
            self.say(_line(row))
        return rows

    def _row(self, arms: Arms, phase: str, method: str, name: str, times: dict, flops: float) -> dict[str, Any]:
        def best(kind: str) -> tuple[str, ...] | None:
            of_method = [key for key in times if key[:2] == (kind, method)]
            return min(of_method, key=lambda key: statistics.median(times[key]), default=None)

        peft, cached, merged = best("peft"), best("cached"), best("merged")
        ours, theirs, floor, improved = (times.get(key) for key in (("ours", method), peft, ("floor",), ("improved floor",)))
        memory = self._memory(_step(arms.ours(method), phase), arms.ours(method))
        peft_memory = None
        if peft is not None:
            arm = arms.peft(method, peft[2])
            peft_memory = self._memory(_step(arm, phase), arm)
        rate = self.machine["matrix_product_gflops"][self.precision]
        return {
            "case": name,
            "seconds": statistics.median(ours),
            "peft_seconds": _median(theirs),
            "floor_seconds": statistics.median(floor),
            "ratio": _over(theirs, ours),
            "tax": _over(ours, floor),
            "peak_memory_bytes": memory / arms.members,
            "peft_peak_memory_bytes": peft_memory,
            "pack_peak_memory_bytes": memory,
            "improved_floor_seconds": _median(improved),
            "peft_cached_seconds": None if cached is None else statistics.median(times[cached]),
            "peft_merged_seconds": None if merged is None else statistics.median(times[merged]),
            "spread": timing.quartiles(ours),
            "peft_spread": None if theirs is None else timing.quartiles(theirs),
            "floor_spread": timing.quartiles(floor),
            "ratio_spread": _over_spread(theirs, ours),
            "tax_spread": _over_spread(ours, floor),
            "peft_precision": None if peft is None else peft[2],
            "floor_precision": self.precision,
            "floor_rate_share": _rate_share(flops, floor, rate),
            "improved_floor_rate_share": _rate_share(flops, improved, rate),
            "repetitions": len(ours),
            "members": arms.members,
            "rows": arms.shape.rows,
            "length": arms.shape.length,
            "target_ratio": self.targets["ratio"].get(name),
            "target_tax": self.targets["tax"].get(name),
            "target_memory_ratio": self.targets["memory"].get(name),
        }

    def _memory(self, step: Callable[[], None], arm: Any) -> int:
        """Most bytes in use at one moment of one step of this arm: its own tensors, and what the step adds."""
        return memory.live_bytes(arm.tensors()) + memory.peak_growth(step, self.device)

    def _worth_trying(self, arms: Arms) -> list[str]:
        """PEFT's precisions within `CLOSE` of its fastest, found by training steps of LoRA; the trial goes into the JSON."""
        if arms.name not in self.peft_precisions:
            tried: dict[str, float] = {}
            firsts = []
            with timing.undisturbed():
                for precision in PRECISIONS:
                    step = arms.peft("lora", precision).train
                    cold = timing.seconds(step, self.device)  # the first step also makes what later ones keep
                    far_off = bool(firsts) and cold > HOPELESS**2 * min(firsts)
                    firsts.append(cold if far_off else timing.seconds(step, self.device))
                    tried[precision] = firsts[-1]
                    if firsts[-1] <= HOPELESS * min(firsts):
                        tried[precision] = statistics.median(timing.seconds(step, self.device) for _ in range(3))
            self.peft_precisions[arms.name] = tried
            for precision in set(PRECISIONS) - set(_close(tried)):
                arms.forget_peft(precision)
        return _close(self.peft_precisions[arms.name])

    def _best_precision(self, arms: Arms) -> str:
        self._worth_trying(arms)
        tried = self.peft_precisions[arms.name]
        return min(tried, key=tried.get)

    def _allocator(self, arms: EncoderArms, case: Case) -> dict[str, Any]:
        steps = max(3, min(self.repetitions or arms.shape.repetitions, 10))
        ours = arms.ours(case.method)
        ours.train()
        seconds, share = ours.allocator_share(steps)
        peft_seconds = peft_share = None
        if case.method in PEFT_METHODS:
            peft = arms.peft(case.method, self._best_precision(arms))
            peft.train()
            peft_seconds, peft_share = peft.allocator_share(steps)
        target = self.targets["allocator"].get(case.name)
        row = {"case": case.name, "seconds": seconds / arms.members, "share": share, "target_share": target}
        row |= {"peft_seconds": peft_seconds, "peft_share": peft_share}
        self.progress(case.name, 1)
        self.say(f"{case.name}: {1000 * row['seconds']:.2f} ms, {100 * share:.1f} % of the step")
        return row

    # -- whole runs ------------------------------------------------------------------------------------------------------

    def _throughput(self, case: Case) -> dict[str, Any]:
        members = int(case.shape.removeprefix("k"))
        arms = lambda k: EncoderArms(self.setup, self.plan.model, throughput.of_members(self.plan.throughput, k))  # noqa: E731
        precision = self._best_precision(arms(1))
        row = throughput.measure_case(case, members, arms, self.plan, precision, self.repetitions)
        self._clean()
        self.progress(case.name, 1)
        self.say(f"{case.name}: " + (row["note"] or f"{row['runs_per_minute']:.2f} runs a minute"))
        return row

    def _study(self) -> None:
        arms = EncoderArms(self.setup, self.plan.model, throughput.of_members(self.plan.throughput, 1))
        precision = self._best_precision(arms)
        del arms
        self._clean()
        target = self.targets["study"].get("study/lora")
        self.found["study"] = throughput.measure_study(self.plan, self.setup, precision) | {"target_ratio": target}
        self.progress("study/lora", 1)
        self.say(f"study/lora: {self.found['study']['ratio']:.2f} times PEFT run by run")

    def _clean(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def machine(device: torch.device, precision: str, products: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """What everything is measured on."""
    import importlib.metadata

    rates = {"fp32": timing.product_rate(torch.float32, device, products)}
    if precision == "bf16":
        rates["bf16"] = timing.product_rate(torch.bfloat16, device, products)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "device": str(device),
        "device_name": measure.device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory,
        "precision": precision,
        "matrix_product_gflops": rates,
        "versions": {**measure.versions(), "peft": importlib.metadata.version("peft")},
        **measure.commit(),
    }


def _close(tried: dict[str, float]) -> list[str]:
    return [precision for precision, seconds in tried.items() if seconds <= CLOSE * min(tried.values())]


def _step(arm: Any, phase: str) -> Callable[[], None]:
    return arm.train if phase == "train" else arm.evaluate


def _median(times: list[float] | None) -> float | None:
    return None if times is None else statistics.median(times)


def _over(above: list[float] | None, below: list[float]) -> float | None:
    """The ratio of two medians."""
    return None if above is None else statistics.median(above) / statistics.median(below)


def _over_spread(above: list[float] | None, below: list[float]) -> list[float] | None:
    """Quartiles of the rounds' own ratios."""
    return None if above is None else timing.quartiles(a / b for a, b in zip(above, below, strict=True))


def _rate_share(flops: float, times: list[float] | None, gflops: float) -> float | None:
    return None if times is None else flops / statistics.median(times) / (1e9 * gflops)


def _line(row: dict[str, Any]) -> str:
    ratio = "no PEFT" if row["ratio"] is None else f"ratio {row['ratio']:.2f}"
    return f"{row['case']}: {1000 * row['seconds']:.2f} ms, {ratio}, tax {row['tax']:.2f}"
