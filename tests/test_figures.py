"""Figures: the same bytes each time, the same colour for a method, legible and complete."""

import itertools
import re
import struct

import pytest
from rankwise.reports import figures, results, stability

from tests.synthetic_runs import BERT_SITES, METHODS, write_anatomy, write_run, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return results.load(write_study(tmp_path_factory.mktemp("study")))


@pytest.fixture(scope="module")
def drawings(study):
    return {drawing.name: drawing for drawing in figures.draw_all(study)}


def labels(drawing):
    return {text.get_text() for ax in drawing.figure.axes for text in ax.texts} | {
        ax.get_title(loc="left") for ax in drawing.figure.axes
    }


def test_a_study_has_every_figure(drawings):
    assert list(drawings) == [
        "differences", "rank-map", "side-by-side", "stability", "budget", "ranks-over-time", "learning-curves", "rates",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def examined(tmp_path_factory):
    """The figures of runs that have sites.json and knockout.json."""
    folder = tmp_path_factory.mktemp("examined")
    for method in ("full", "lora", "adalora"):
        for seed in (0, 1, 2):
            write_anatomy(write_run(folder, method=method, seed=seed), knocked=method != "full")
    return {drawing.name: drawing for drawing in figures.draw_all(results.load(folder))}


def test_importance_is_drawn_against_the_cut(examined):
    (ax,) = examined["importance"].figure.axes
    points = {line.get_label(): line for line in ax.lines if line.get_marker() == "."}
    assert {label: len(line.get_xdata()) for label, line in points.items()} == {"cut": 144, "kept": 288}
    together = sorted(
        zip(
            [*points["cut"].get_xdata(), *points["kept"].get_xdata()],
            [*points["cut"].get_ydata(), *points["kept"].get_ydata()],
            strict=True,
        )
    )
    heights = [y for _, y in together]
    assert heights == sorted(heights, reverse=True) and [x for x, _ in together] == list(range(1, 433))
    assert "288 kept" in labels(examined["importance"])


def test_spectra_stand_beside_full_fine_tuning_s(examined):
    (ax, *_) = examined["spectra"].figure.axes
    lines = {line.get_label(): line for line in ax.lines}
    assert set(lines) == {"full", "lora", "adalora"}
    assert list(lines["full"].get_xdata()) == list(range(1, 17)) and len(lines["lora"].get_xdata()) == 8
    assert lines["full"].get_ydata()[0] == pytest.approx(0.3)
    assert lines["full"].get_color() == figures.METHOD_COLOURS["full"]


def test_the_loss_without_a_site_is_drawn_against_its_importance(examined):
    titles = {ax.get_title(loc="left"): ax for ax in examined["knock-out"].figure.axes}
    assert set(titles) == {"lora", "adalora"}
    assert titles["adalora"].get_title(loc="right") == "rho +1.00, n = 3"
    assert titles["adalora"].get_xlabel().startswith("importance") and titles["lora"].get_xlabel() == "|dW| / |W|"


def test_two_allocations_are_drawn_with_their_difference():
    one = {f"layer.{i}.{kind}": 4.0 for i in range(3) for kind in "ab"}
    other = {**one, "layer.0.a": 1.0, "layer.2.b": 7.0, "pooler": 2.0}
    drawing = figures.side_by_side("lora", one, "adalora", other, "here")
    left, middle, right, *_ = drawing.figure.axes
    assert [ax.get_title(loc="left") for ax in (left, middle)] == ["lora   total 24", "adalora   total 26"]
    written = {(t.get_position()[0] - 0.5, int(t.get_position()[1])): t.get_text() for t in right.texts}
    assert written == {(0, 0): "-3", (1, 0): "0", (2, 0): "0", (0, 1): "0", (1, 1): "0", (2, 1): "3", (1, 2): "2"}
    assert right.collections[0].get_clim() == (-3.0, 3.0)  # 0 is the middle of the colours


def test_the_pair_that_differs_most_is_laid_side_by_side(tmp_path):
    ranks = [dict.fromkeys(BERT_SITES, 8), {**dict.fromkeys(BERT_SITES, 8), BERT_SITES[0]: 9}, dict.fromkeys(BERT_SITES, 2)]
    for name, of in zip("abc", ranks, strict=True):
        write_run(tmp_path, setting=name, ranks=of)
    (first, second, *_) = figures.allocation_pair(results.load(tmp_path)).figure.axes
    assert [ax.get_title(loc="left").split()[0] for ax in (first, second)] == ["b", "c"]


def test_seeds_are_compared_by_spearman_and_jaccard(tmp_path):
    ranks = [{"l.0.a": 0, "l.0.b": 1, "l.1.a": 4, "l.1.b": 2}, {"l.0.a": 0, "l.0.b": 2, "l.1.a": 3, "l.1.b": 0}]
    for seed, of in enumerate(ranks):
        write_run(tmp_path, method="adalora", seed=seed, ranks=of)
    write_run(tmp_path, method="lora", seed=0)
    write_run(tmp_path, method="lora", seed=1)
    arms = {arm.setting: arm for arm in results.load(tmp_path).arms}
    (pair,) = stability.seed_pairs(arms["adalora"])
    # Places 1 2 4 3 and 1.5 3 4 1.5: deviations -1.5 -.5 1.5 .5 and -1 .5 1.5 -1.
    assert pair.spearman == pytest.approx((1.5 - 0.25 + 2.25 - 0.5) / (5 * 4.5) ** 0.5)
    assert pair.jaccard_ranks == pytest.approx((0 + 1 + 3 + 0) / (0 + 2 + 4 + 2))
    assert pair.jaccard_sites == pytest.approx(2 / 3)
    assert stability.seed_pairs(arms["lora"]) == []


def test_pairs_of_many_seeds_do_not_swell_the_file(tmp_path):
    for seed in range(60):
        write_run(tmp_path, method="adalora", seed=seed, steps=2, sites=BERT_SITES[:6])
    many = results.load(tmp_path)
    few = results.replace(many, runs=tuple(run for run in many.runs if run.config.seed < 20))
    sizes = {}
    for name, study in (("few", few), ("many", many)):
        svg, _ = figures.save(figures.stability(study), tmp_path / name)
        sizes[name] = svg.stat().st_size
        assert ("data:image/png" in svg.read_text()) == (name == "many")
    assert sizes["many"] < 1.5 * sizes["few"]  # 1,770 pairs and 190


@pytest.mark.slow
def test_the_same_runs_give_the_same_bytes(study, tmp_path):
    for function in (figures.budget, figures.rates):
        once = figures.save(function(study), tmp_path / "1")
        again = figures.save(function(study), tmp_path / "2")
        assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]
        assert not re.search(rb"<dc:date>|20\d\d-\d\d-\d\d|Matplotlib v", once[0].read_bytes())


@pytest.mark.slow
def test_main_figures_are_saved_for_papers_and_the_same_twice(drawings, tmp_path):
    assert drawings["rank-map"].is_main and not drawings["budget"].is_main
    made, study = [], results.load(write_study(tmp_path / "study", methods=("full", "lora"), sweep=False)).parts()[0]
    for turn in ("first", "second"):
        figures.save(figures.differences(study), tmp_path / turn)
        made.append((tmp_path / turn / "differences.pdf").read_bytes())
    assert made[0] == made[1] and made[0].startswith(b"%PDF") and b"/Type3" not in made[0]


def test_the_differences_show_every_verdict(drawings):
    assert {"differences"} <= drawings.keys()
    texts = labels(drawings["differences"])
    assert texts & {"better", "worse", "undecided", "no claim", "equivalent"}


@pytest.mark.slow
def test_pngs_are_as_wide_as_a_readme_and_no_wider(drawings, tmp_path):
    for drawing in (drawings["rank-map"], drawings["learning-curves"]):
        _, png = figures.save(drawing, tmp_path)
        width, height = struct.unpack(">II", png.read_bytes()[16:24])
        assert 900 <= width <= 2000
        assert 400 <= height <= 2000


def test_every_method_has_its_own_colour_and_keeps_it(study, drawings):
    assert len({figures.colour(method) for method in METHODS}) == len(METHODS)
    for name in ("learning-curves", "rates"):
        for ax in drawings[name].figure.axes:
            for line in ax.lines:
                if line.get_label() in METHODS:
                    assert line.get_color() == figures.METHOD_COLOURS[line.get_label()]


def test_an_unnamed_method_has_a_colour_of_no_named_one():
    assert figures.colour("sora") == figures.colour("sora")
    assert figures.colour("sora") not in figures.METHOD_COLOURS.values()


def test_settings_of_one_method_share_the_colour_and_differ_in_style(tmp_path):
    for setting in ("lora r4", "lora r8"):
        write_run(tmp_path, method="lora", setting=setting)
    drawing = figures.learning_curves(results.load(tmp_path))
    lines = [line for line in drawing.figure.axes[0].lines if line.get_label().startswith("lora")]
    assert len({line.get_color() for line in lines}) == 1
    assert len({line.get_linestyle() for line in lines}) == 2


def test_the_rank_of_each_cell_is_written_in_it(tmp_path):
    ranks = {f"encoder.layer.{layer}.{kind}": 10 * layer + i for layer in range(3) for i, kind in enumerate("abc", 1)}
    ranks["pooler.dense"] = 47
    write_run(tmp_path, ranks=ranks, nominal_ranks=dict.fromkeys(ranks, 50))
    (ax, _) = figures.rank_map(results.load(tmp_path)).figure.axes
    written = {(text.get_position()[0], int(text.get_position()[1])): text.get_text() for text in ax.texts}
    expected = {(layer + 0.5, i): str(10 * layer + i + 1) for layer in range(3) for i in range(3)}
    assert written == expected | {(1.5, 3): "47"}
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c", "dense"]


def test_the_rank_map_shows_means_over_seeds_and_says_so(drawings):
    assert "mean of 3 seeds" in drawings["rank-map"].title
    assert {"lora   total 288", "adalora   total 288"} <= labels(drawings["rank-map"])


def test_the_schedule_is_drawn_over_the_active_ranks(drawings):
    ax = drawings["budget"].figure.axes[0]
    lines = {line.get_label(): line for line in ax.lines}
    assert {"active", "schedule", "live (E not 0)"} <= set(lines)
    assert list(lines["active"].get_ydata()) == list(lines["schedule"].get_ydata())
    assert lines["schedule"].get_ydata()[0] == 432
    assert lines["schedule"].get_ydata()[-1] == 288


def test_labels_at_the_line_ends_do_not_overlap(drawings):
    figure = drawings["ranks-over-time"].figure
    figure.canvas.draw()
    for ax in figure.axes:
        boxes = sorted((text.get_window_extent() for text in ax.texts), key=lambda box: box.y0)
        assert len(boxes) == 6
        for below, above in itertools.pairwise(boxes):
            assert below.y1 <= above.y0 + 1


def test_a_collapsed_rate_is_marked_and_does_not_squash_the_others(tmp_path):
    for rate, score, error in ((1e-4, 84.0, None), (1e-3, 85.0, None), (1e-2, 3.0, None), (1e-1, None, "collapsed")):
        write_run(tmp_path, rate=rate, phase="sweep", selection_score=score or 0.0, error=error)
    drawing = figures.rates(results.load(tmp_path))
    (ax,) = drawing.figure.axes
    assert "x: failed" in drawing.title
    assert ax.get_ylim()[0] > 50
    assert ax.get_title(loc="right") == "cut below 61"
    assert "3" in labels(drawing)  # its score is written where it leaves the axis
    assert [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "x"] == [1e-1]


def test_a_best_rate_at_the_edge_is_written_on_the_figure(tmp_path):
    for rate, score in ((1e-4, 84.0), (1e-3, 85.0)):
        write_run(tmp_path, rate=rate, phase="sweep", selection_score=score)
    assert "edge" in labels(figures.rates(results.load(tmp_path)))


def test_what_has_no_data_is_not_drawn(tmp_path):
    for method in ("full", "head"):
        write_run(tmp_path, method=method)
    assert [drawing.name for drawing in figures.draw_all(results.load(tmp_path))] == ["learning-curves"]
    write_run(tmp_path / "none", error="collapsed")
    assert figures.draw_all(results.load(tmp_path / "none")) == []
