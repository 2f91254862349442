"""What is known of each site: stability of its rank over seeds, importance, spectrum, loss without it."""

import numpy as np
from rankwise.experiments.records import Run
from rankwise.reports.figures.style import (
    FAINT,
    INK,
    KIND_COLOURS,
    MARKERS,
    Drawing,
    colour,
    house_style,
    line_styles,
    panels,
    seeds_text,
    setting_names,
    subject,
    title_above,
)
from rankwise.reports.ranks.maps import RankMap, with_loss_increase
from rankwise.reports.ranks.sites import module_labels, site_order
from rankwise.reports.results import Arm, Study
from rankwise.reports.stability import seed_pairs
from rankwise.reports.statistics import spearman

MOST_PAIRS = 300  # of 25 seeds; more points are an image in the SVG and the PDF, which else grow with the square of the seeds


def stability(study: Study) -> Drawing | None:
    """Agreement of the allocations of each pair of seeds: Spearman's correlation, and Jaccard's overlap of ranks and sites."""
    by_arm = {arm: pairs for arm in study.arms if (pairs := seed_pairs(arm))}
    if not by_arm:
        return None
    measures = {"Spearman": "spearman", "Jaccard, ranks": "jaccard_ranks", "Jaccard, sites": "jaccard_sites"}
    with house_style():
        figure, axes = panels(1, 3, (9.8, 0.42 * len(by_arm) + 1.9), sharey=True)
        for ax, (name, field) in zip(axes, measures.items(), strict=True):
            for row, (arm, pairs) in enumerate(by_arm.items()):
                values = [value for pair in pairs if (value := getattr(pair, field)) is not None]
                # Points of one setting are moved apart up and down, so that equal ones can be counted.
                spread = np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else [0.0]
                ax.plot(values, row + np.asarray(spread)[: len(values)], linestyle="", marker=MARKERS.get(arm.method, "o"),
                        markersize=4, alpha=0.6, color=colour(arm.method), rasterized=len(values) > MOST_PAIRS)  # fmt: skip
                if values:
                    ax.plot([np.mean(values)] * 2, [row - 0.34, row + 0.34], color=colour(arm.method), linewidth=2.2)
            ax.set_title(name)
            ax.set_xlim(-1.05 if name == "Spearman" else -0.05, 1.05)
        axes[0].set_yticks(range(len(by_arm)), setting_names(list(by_arm)))
        axes[0].set_ylim(len(by_arm) - 0.5, -0.5)
        title = f"Is the allocation the same at another seed? {subject(study)} (a point a pair of seeds, a line their mean)"
        title_above(figure, title)
    alt = f"Agreement of the ranks of pairs of seeds for {', '.join(setting_names(list(by_arm)))}."
    return Drawing("stability", title, alt, figure, is_main=True)


def importance(study: Study) -> Drawing | None:
    """The allocator's scores of all slots, sorted, those kept and those cut; the first seed of each setting."""
    shown = {arm: run for arm in study.arms for run in _with_scores(arm)[:1]}
    if not shown:
        return None
    columns = min(len(shown), 2)
    rows = -(-len(shown) // columns)
    with house_style():
        figure, axes = panels(rows, columns, (9.6 if columns == 2 else 6.4, 3.0 * rows + 0.6))
        for ax, (arm, run) in zip(axes, shown.items(), strict=False):
            slots = [
                (score, keep == "1")
                for facts in run.sites.values()
                for score, keep in zip(facts.scores or (), facts.kept or "", strict=True)
                if score is not None
            ]
            slots.sort(key=lambda slot: -slot[0])
            for keep, tint, label in ((False, FAINT, "cut"), (True, colour(arm.method), "kept")):
                points = [(i + 1, score) for i, (score, kept) in enumerate(slots) if kept == keep]
                if points:
                    ax.plot(*zip(*points, strict=True), linestyle="", marker=".", markersize=4, color=tint, label=label)
            kept = sum(keep for _, keep in slots)
            ax.axvline(kept + 0.5, color=INK, linewidth=1.0, linestyle=(0, (4, 2.5)))
            ax.annotate(f"{kept:,} kept", (kept + 0.5, 0.97), xycoords=("data", "axes fraction"), xytext=(4, 0),
                        textcoords="offset points", va="top", fontsize=8.5, color=INK)  # fmt: skip
            positive = [score for score, _ in slots if score > 0]
            if len(positive) == len(slots) and max(positive) > 20 * min(positive):
                ax.set_yscale("log")
            ax.set_title(f"{arm.setting}, seed {run.config.seed}")
            ax.set_xlabel("slot, the most important first")
            ax.legend(loc="lower left")
        axes[0].set_ylabel("importance (the allocator's score)")
        for ax in axes[len(shown) :]:
            ax.set_axis_off()
        title = f"Importance of every slot at the end, and the cut, {subject(study)}"
        title_above(figure, title)
    alt = f"Sorted importance scores and which slots were kept, for {', '.join(setting_names(list(shown)))}."
    return Drawing("importance", title, alt, figure)


def _with_scores(arm: Arm) -> list[Run]:
    return [run for run in arm.of("completed") if any(facts.scores for facts in run.sites.values())]


def spectra(study: Study) -> Drawing | None:
    """Singular values of dW for each kind of module, means over layers and seeds; full fine-tuning's dW among them."""
    by_arm = {arm: values for arm in study.arms if (values := _mean_spectra(arm))}
    if not by_arm:
        return None
    sites = site_order(site for values in by_arm.values() for site in values)
    labels = module_labels(sites)
    kinds = list(dict.fromkeys(labels[site] for site in sites))
    columns = min(len(kinds), 3)
    rows = -(-len(kinds) // columns)
    with house_style():
        figure, axes = panels(rows, columns, (3.3 * columns, 2.6 * rows + 0.9), sharex=True, sharey=True)
        for ax, kind in zip(axes, kinds, strict=False):
            for arm, line in line_styles(list(by_arm)):
                members = [by_arm[arm][site] for site in sites if labels[site] == kind and site in by_arm[arm]]
                length = max(map(len, members), default=0)
                padded = np.array([values + [0.0] * (length - len(values)) for values in members])
                if not length:
                    continue
                means = padded.mean(0)
                shown = means > 0
                ax.plot(np.arange(1, length + 1)[shown], means[shown], label=arm.setting, color=colour(arm.method),
                        linestyle=line, linewidth=1.5, marker=MARKERS.get(arm.method, "o"), markersize=3)  # fmt: skip
            ax.set_yscale("log")
            ax.set_title(kind)
            ax.xaxis.get_major_locator().set_params(integer=True)
        for ax in axes[len(kinds) :]:
            ax.set_axis_off()
        for ax in axes[: len(kinds)][-columns:]:
            ax.set_xlabel("place")
        for ax in axes[::columns]:
            ax.set_ylabel("singular value of dW")
        handles = {line.get_label(): line for ax in axes for line in ax.lines}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 6))
        title = f"Spectrum of each update, {subject(study)} (means over layers; {seeds_text(list(by_arm))})"
        title_above(figure, title)
    alt = f"Singular values of dW by kind of module for {', '.join(setting_names(list(by_arm)))}."
    return Drawing("spectra", title, alt, figure)


def one_spectrum(one: RankMap) -> Drawing:
    """Singular values of every site's dW in one run or adapter, a colour a kind of module."""
    labels = module_labels([site.site for site in one.sites])
    kinds = list(dict.fromkeys(labels.values()))
    with house_style():
        figure, (ax,) = panels(1, 1, (7.6, 4.2))
        for site in one.sites:
            tint = KIND_COLOURS[kinds.index(labels[site.site]) % len(KIND_COLOURS)]
            ax.plot(range(1, len(site.singular_values) + 1), site.singular_values, color=tint, linewidth=1.1, alpha=0.75,
                    label=labels[site.site])  # fmt: skip
        ax.set_yscale("log")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel("place")
        ax.set_ylabel("singular value of dW")
        handles = {line.get_label(): line for line in ax.lines}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 4))
        title = f"Spectrum of each site's update, {one.name}"
        title_above(figure, title)
    return Drawing("spectra", title, f"Singular values of dW of {len(one.sites)} sites.", figure)


def _mean_spectra(arm: Arm) -> dict[str, list[float]]:
    """Site -> the mean over seeds of each singular value that was stored; one that a seed lacks counts as 0."""
    runs = [run.sites for run in arm.of("completed") if run.sites]
    means = {}
    for site in dict.fromkeys(site for sites in runs for site in sites):
        values = [sites[site].singular_values or [] for sites in runs if site in sites]
        length = max(map(len, values), default=0)
        if length:
            means[site] = np.mean([one + [0.0] * (length - len(one)) for one in values], axis=0).tolist()
    return means


def knock_out(study: Study) -> Drawing | None:
    """The rise of the loss without each site against its importance, or against |dW|/|W| where a method has none."""
    shown = {}
    for arm in study.arms:
        runs = [run for run in arm.of("completed") if run.knock_out and run.sites]
        if runs:
            shown[arm] = runs
    if not shown:
        return None
    columns = min(len(shown), 3)
    rows = -(-len(shown) // columns)
    with house_style():
        figure, axes = panels(rows, columns, (3.3 * columns + 0.4, 2.8 * rows + 0.7))
        for ax, (arm, runs) in zip(axes, shown.items(), strict=False):
            by = "importance" if any(with_loss_increase(run, "importance")[0] for run in runs) else "relative_norm"
            for run in runs:
                values, increases = with_loss_increase(run, by)
                ax.plot(values, increases, linestyle="", marker=MARKERS.get(arm.method, "o"), markersize=4, alpha=0.6,
                        color=colour(arm.method))  # fmt: skip
            correlations = [spearman(*with_loss_increase(run, by)) for run in runs]
            known = [value for value in correlations if value is not None]
            ax.axhline(0, color=FAINT, linewidth=0.8)
            ax.set_title(arm.setting)
            if known:
                words = f"rho {np.mean(known):+.2f}, n = {len(known)}"
                ax.set_title(words, loc="right", fontsize=9, fontweight="normal", color=INK)
            ax.set_xlabel("importance, sum of the site" if by == "importance" else "|dW| / |W|")
        for ax in axes[::columns]:
            ax.set_ylabel("rise of the loss without it")
        for ax in axes[len(shown) :]:
            ax.set_axis_off()
        title = f"What each site is worth when it is taken out, {subject(study)} (rho: Spearman, mean over n seeds)"
        title_above(figure, title)
    alt = f"Rise of the loss without each site against its importance or size, for {', '.join(setting_names(list(shown)))}."
    return Drawing("knock-out", title, alt, figure)
