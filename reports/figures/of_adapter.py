"""Figures of an examined adapter (`rankwise doctor --figures`): spectra, and the error of every size beside the criteria."""

import numpy as np
from rankwise.reports.figures.style import FAINT, INK, KIND_COLOURS, Drawing, house_style, panels, title_above
from rankwise.reports.ranks.sites import module_labels
from rankwise.variants.doctor.examining import Examination


def of_adapter(one: Examination) -> list[Drawing]:
    """Empty where no site has an update that is not zero."""
    return [spectra_and_criteria(one)] if any(site.update.update_norm for site in one.sites) else []


def spectra_and_criteria(one: Examination) -> Drawing:
    """Left each site's singular values over its Marchenko-Pastur edge; right the error at each number of ranks."""
    sites = [site for site in one.sites if site.update.update_norm]
    labels = module_labels([site.site.name for site in sites])
    kinds = list(dict.fromkeys(labels.values()))
    with house_style():
        figure, (left, right) = panels(1, 2, (10.5, 4.4))
        for site in sites:
            tint = KIND_COLOURS[kinds.index(labels[site.site.name]) % len(KIND_COLOURS)]
            values = np.asarray(site.update.singular_values)
            left.plot(range(1, len(values) + 1), values / site.edge, color=tint, linewidth=1.1, alpha=0.75, marker=".",
                      markersize=3, label=labels[site.site.name])  # fmt: skip
        left.axhline(1.0, color=FAINT, linewidth=1.0, linestyle="--")
        left.set_yscale("log")
        left.xaxis.get_major_locator().set_params(integer=True)
        left.set_xlabel("place")
        left.set_ylabel("singular value of dW / Marchenko-Pastur edge")
        left.set_title("Spectrum of each site")
        pool = np.sort(np.concatenate([site.update.singular_values for site in sites]))[::-1]
        lost = np.sqrt(np.append(np.cumsum(pool[::-1] ** 2)[::-1], 0.0) / (pool**2).sum())  # error at 0, 1, ... ranks
        right.plot(range(len(lost)), 100 * lost, color=INK, linewidth=1.4, label="best of that total rank")
        for i, (name, made) in enumerate(one.suggestions.items()):
            right.plot([made.total], [100 * made.error], linestyle="", marker="osD^vP"[i % 6], markersize=7, clip_on=False,
                       color=KIND_COLOURS[i % len(KIND_COLOURS)], label=f"{name}: {made.setting}")  # fmt: skip
        right.set_xlabel("ranks over all sites")
        right.set_ylabel("relative error of dW [%]")
        right.set_ylim(bottom=0)
        right.set_title("What each criterion keeps")
        right.legend()
        handles = {line.get_label(): line for line in left.lines if not str(line.get_label()).startswith("_")}
        figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=min(len(handles), 5))
        title = f"Spectra and criteria of {one.adapter.path.resolve().name} ({one.adapter.method})"
        title_above(figure, title)
    alt = f"Singular values of dW of {len(sites)} sites over the noise edge; the error at each total rank with the criteria."
    return Drawing("doctor", title, alt, figure)
