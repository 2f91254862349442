"""The rank of every site of one run or adapter, with what else is known of the site."""

from dataclasses import asdict, dataclass, replace

from rankwise.experiments.records import RankStep, Run
from rankwise.reports.ranks.sites import site_order, split_site

FACTS = ("parameters", "share", "effective_rank", "stable_rank", "energy_rank", "relative_norm", "importance", "intruders")


@dataclass(frozen=True)
class SiteRank:
    site: str
    layer: int | None
    module: str
    active: int
    nominal: int
    alpha: float | None
    scale: float | None
    parameters: int | None = None
    share: float | None = None  # of all low-rank parameters
    effective_rank: float | None = None
    stable_rank: float | None = None
    energy_rank: int | None = None
    relative_norm: float | None = None  # |dW|/|W|
    importance: float | None = None  # the allocator's score, summed over the slots it keeps
    intruders: int | None = None
    loss_increase: float | None = None  # without this site
    singular_values: tuple[float, ...] = ()


@dataclass(frozen=True)
class RankMap:
    """The ranks of one run or adapter, in the model's order."""

    kind: str  # "run" or "adapter"
    name: str
    method: str
    note: str | None
    sites: tuple[SiteRank, ...]
    faults: tuple[str, ...] = ()
    trajectory: tuple[RankStep, ...] = ()
    evaluated: str | None = None  # what `loss_increase` was measured on

    @property
    def active(self) -> int:
        return sum(site.active for site in self.sites)

    @property
    def nominal(self) -> int:
        return sum(site.nominal for site in self.sites)

    def as_dict(self) -> dict:
        """For `rankwise ranks --json`."""
        return {
            "schema": 1,
            "kind": self.kind,
            "name": self.name,
            "method": self.method,
            "note": self.note,
            "active": self.active,
            "nominal": self.nominal,
            "at_rank_0": sum(site.active == 0 for site in self.sites),
            "faults": list(self.faults),
            "evaluated": self.evaluated,
            "sites": [asdict(site) for site in self.sites],
            "trajectory": [row.model_dump() for row in self.trajectory],
        }


def of_run(run: Run) -> RankMap:
    """The ranks of one run.

    Raises:
        ValueError: its method has none, and nothing was written of its weights either.
    """
    config, result = run.config, run.result
    if result:
        active, nominal, scale, note = result.ranks, result.nominal_ranks, result.scale, None
        if result.status == "failed":
            note = f"this run failed ({result.error}); these are the ranks it had"
    else:
        history = run.rank_history
        active, nominal = (history[-1].ranks, history[0].ranks) if history else ({}, {})
        scale, note = None, f"not finished: step {history[-1].step if history else 0}"
    facts, knocked = run.sites, run.knock_out
    if not active and facts:  # full fine-tuning
        active, nominal = ({name: getattr(one, key) for name, one in facts.items()} for key in ("active", "nominal"))
    if not active:
        raise ValueError(f"{run.folder}: {config.method} ({run.status}) has no ranks; give the run of a low-rank method")
    alpha = config.method_settings.get("alpha")
    alpha = float(alpha) if isinstance(alpha, int | float) and not isinstance(alpha, bool) else None
    increases = knocked.increases if knocked else {}
    sites = []
    for name in site_order(active):
        site = bare_site(name, active[name], nominal.get(name, active[name]), alpha, _of_site(scale, name))
        known = {key: getattr(facts[name], key) for key in FACTS} if name in facts else {}
        values = tuple(facts[name].singular_values or ()) if name in facts else ()
        sites.append(replace(site, **known, singular_values=values, loss_increase=increases.get(name)))
    name = f"{config.setting}, {config.task}, {config.model}, seed {config.seed}, rate {config.learning_rate:g}"
    evaluated = f"{knocked.rows} rows of the {knocked.split} split" if knocked else None
    return RankMap("run", name, config.method, note, tuple(sites), (), tuple(run.rank_history), evaluated)


def with_loss_increase(run: Run, by: str) -> tuple[list[float], list[float]]:
    """For each site the value of `by`, a field of `SiteFacts`, and the measured rise of the loss without that site."""
    increases = run.knock_out.increases if run.knock_out else {}
    values = {site: getattr(facts, by) for site, facts in run.sites.items()}
    both = [site for site in increases if values.get(site) is not None]
    return [values[site] for site in both], [increases[site] for site in both]


def _of_site(scale: dict[str, float] | float | None, site: str) -> float | None:
    return scale.get(site) if isinstance(scale, dict) else scale


def bare_site(name: str, active: int, nominal: int, alpha: float | None, scale: float | None) -> SiteRank:
    _, layer, module = split_site(name)
    return SiteRank(name, layer, module, active, nominal, alpha, scale)
