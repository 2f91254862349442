"""report.html: whole, escaped, and usable in a browser by mouse, by keyboard, on a phone and in print."""

import itertools
import json
import re
import shutil
import time
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from rankwise.reports import figures, page, results, tables
from rankwise.reports.page import charts, html
from rankwise.reports.page.charts import scores
from rankwise.reports.verdicts import Verdict, verdicts

from tests.synthetic_runs import BERT_SITES, final_ranks, write_json, write_run, write_study

HOSTILE = "</script><b id=\"planted\">&amp; 'quoted' <!--"
BESIDE = tables.Table(
    "beside", "AdaLoRA, Table 1, beside MiniLM in its place", ("cell", "published", "ours", "status"),
    (("AdaLoRA: STS-B", 91.84, tables.Estimate(85.2, 84.9, 85.5, 0.2, 3), "not comparable"), ("LoRA: STS-B", 91.68, None, "-")),
    ("Another model stands in.",),
)  # fmt: skip


def said(study, kinds=("undecided", "equivalent", "worse", "better", "no claim")):
    """The study's verdicts, of every kind: the numbers are real, the kinds are not."""
    kinds = itertools.cycle(kinds)
    found = [(verdict, next(kinds)) for verdict in verdicts(study)]
    return [replace(v, kind=kind, text=f"{kind} (difference {v.mean:+.2f})") for v, kind in found]


def rendered(folder, beside=None, **changes):
    """The page of a folder of runs, without the files beside it, which take longer to draw."""
    sections = [page.section(part) for study in results.load_all(folder) for part in study.parts()]
    return html.render([section | changes for section in sections], beside=beside)


def claim(setting, reference, text, kind="better"):
    return Verdict(setting, reference, "a task", kind, 2, 1.0, None, None, None, None, text)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = write_study(tmp_path_factory.mktemp("study"), quick=True)
    write_run(folder, method="lora", setting="lora again")  # a second setting of a method, and of one seed
    return results.load(folder)


@pytest.fixture(scope="module")
def text(study):
    section = page.section(study, "rankwise compare stsb-minilm") | {"verdicts": said(study), "warnings": ["Scales differ."]}
    return html.render([section], beside=BESIDE)


class Page(HTMLParser):
    """What stands where: elements with their attributes, and the text of each script."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.scripts, self.headings, self.words = [], [], [], []
        self._inside = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append([int(tag[1]), ""])
        if tag == "script":
            self.scripts.append([dict(attributes), ""])

    def handle_endtag(self, tag):
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data):
        if "script" in self._inside:
            self.scripts[-1][1] += data
        elif "style" not in self._inside:
            self.words.append(data)
        if self._inside and re.fullmatch("h[1-6]", self._inside[-1]):
            self.headings[-1][1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def specifications(self):
        return {a["data-chart"]: json.loads(body) for a, body in self.scripts if "data-chart" in a}


@pytest.fixture(scope="module")
def parsed(text):
    return Page(text)


# --- structure, without a browser ----------------------------------------------------------------------------------


def test_headings_are_in_order_and_verdicts_come_first(parsed):
    levels = [level for level, _ in parsed.headings]
    assert levels[:2] == [1, 2] and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert [name for level, name in parsed.headings if level == 3] == [
        "Verdicts", "Comparison", "Score against active parameters", "Score against learning rate",
        "Active rank of each layer and module", "Rank budget against its schedule",
        "The allocation at another seed", "Whether settings place rank alike", "Paper against ours",
        "How each number was made",
    ]  # fmt: skip


def test_every_name_that_is_pointed_to_is_there_once(parsed):
    identities = [a["id"] for _, a in parsed.elements if "id" in a]
    assert len(identities) == len(set(identities))
    pointed = [a[key] for _, a in parsed.elements for key in ("aria-labelledby", "data-chart", "data-map") if key in a]
    pointed += [a["href"][1:] for a in parsed.all("a")]
    assert len(pointed) > 20
    assert set(pointed) <= set(identities)


def test_the_page_asks_for_nothing_from_elsewhere(parsed, text):
    assert parsed.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in parsed.all("meta")
    for _, attributes in parsed.elements:
        for key in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(key, "#").startswith(("#", "data:"))
    assert not re.search(r"@import|url\(", re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1])
    assert "$schema" not in "".join(body for a, body in parsed.scripts if a.get("type") == "application/json")
    assert text.count("window.vegaEmbed=") == 1


def test_a_quick_study_says_so_first_and_names_the_full_protocol(parsed):
    words = " ".join("".join(parsed.words).split())
    alarm = words.index("A quick look, no fair comparison")
    assert alarm < words.index("The full protocol: rankwise compare stsb-minilm") < words.index("Verdicts")
    assert words.index("Scales differ.") < words.index("Comparison")


def test_each_verdict_is_a_line_in_words_and_minus_is_a_minus(parsed, study):
    words = " ".join("".join(parsed.words).split())
    for verdict in said(study):
        assert f"{verdict.setting} {charts.words(verdict.text)}" in words
    assert "-2." not in words


def test_each_figure_has_words_and_a_table_of_its_numbers(parsed, study):
    figure = len(parsed.all("figure"))
    assert figure == len(parsed.all("figcaption")) == 5
    folded = [attributes for attributes in parsed.all("details") if attributes.get("class") != "reproduce"]
    assert len(folded) == figure + 2  # the others: all statistics, and the settings
    assert len(parsed.all("details")) - len(folded) == len(parsed.all("table")) - 2  # each but the settings', and the paper's
    labels = {a["id"]: a["aria-label"] for a in parsed.all("div") if a.get("class") == "chart"}
    assert labels.keys() == parsed.specifications.keys()
    assert "dora" in labels["p1-score-parameters-1"] and "lora 86.80 at 1e-3" in labels["p1-rates-1"]
    assert "adalora 288" in labels["p1-rank-map-1"]


def test_every_chart_uses_the_colour_of_the_method(parsed, study):
    colours = {arm.setting: figures.colour(arm.method) for arm in study.arms}
    found = {}

    def look(value):
        if isinstance(value, list):
            for item in value:
                look(item)
        elif isinstance(value, dict):
            scale = value.get("color", {}).get("scale", {}) if isinstance(value.get("color"), dict) else {}
            if "domain" in scale and "range" in scale:
                for setting, colour in zip(scale["domain"], scale["range"], strict=True):
                    found.setdefault(setting, set()).add(colour)
            for item in value.values():
                look(item)

    look(list(parsed.specifications.values()))
    assert found == {setting: {colour} for setting, colour in colours.items()}


def test_a_paper_beside_ours_is_shown_only_where_it_is_given(text, study):
    assert "AdaLoRA, Table 1, beside MiniLM" in text and "Another model stands in." in text
    assert "Paper against ours" not in html.render([page.section(study)])


def test_the_same_runs_give_the_same_bytes(study):
    once, again = (html.render([page.section(study) | {"verdicts": said(study)}], beside=BESIDE) for _ in range(2))
    assert once == again


def test_what_a_run_says_is_never_markup(tmp_path):
    for method in ("full", "lora", "adalora"):
        for rate in (1e-3, 2e-3):
            write_run(tmp_path, method=method, setting=f"{method} {HOSTILE}", rate=rate, phase="sweep", study=HOSTILE,
                      task=HOSTILE, model=HOSTILE, caption=[HOSTILE], sites=[f"a.{HOSTILE}.{i}.{HOSTILE}" for i in (0, 1)],
                      selection_score=80 - rate)  # fmt: skip
            write_run(tmp_path, method=method, setting=f"{method} {HOSTILE}", rate=rate, study=HOSTILE, task=HOSTILE,
                      model=HOSTILE, sites=[f"a.{HOSTILE}.{i}.{HOSTILE}" for i in (0, 1)], device_name=HOSTILE,
                      error=HOSTILE if method == "full" else None, metric=HOSTILE)  # fmt: skip
    lines = [claim(f"lora {HOSTILE}", HOSTILE, HOSTILE)]
    beside = tables.Table("beside", HOSTILE, (HOSTILE, "ours"), ((HOSTILE, HOSTILE),), (HOSTILE,))
    text = rendered(tmp_path, beside, verdicts=lines, warnings=[HOSTILE], command=HOSTILE)
    assert HOSTILE not in text and "<b " not in text
    parsed = Page(text)
    assert not parsed.all("b")
    assert len(parsed.specifications) == 5
    assert HOSTILE in "".join(parsed.words)
    rows = parsed.specifications["p1-rates-1"]["datasets"]["rows"]
    assert {row["setting"] for row in rows} == {f"{method} {HOSTILE}" for method in ("full", "lora", "adalora")}


def test_cells_are_sorted_by_the_number_they_stand_for():
    seconds = tables.Cost((130.0, 31.0), (1, 3), tables.seconds_text)
    numbers = {1_200: 1200, 0.5: 0.5, "5e-5": 5e-5, "2 to 3": 2, "1,024": 1024, None: None, "-": None, "4 worse": None}
    assert {cell: html.sort_key(cell) for cell in numbers} == numbers
    assert html.sort_key(seconds) == 130 and html.sort_key(tables.Rank(7, 12)) == 7
    assert html.sort_key(tables.Estimate(85.5, 85.2, 85.8, 0.1, 3)) == 85.5
    assert (
        html.sort_key(tables.SweepScore(None, 1, 1, "")) is None and html.sort_key(tables.SweepScore(83.0, 0, 1, "best")) == 83
    )
    table = tables.Table("t", "t", ("setting", "size", "status"), (("8 bit", 3, "2 of 5"), ("4 bit", None, "1 of 5")), ())
    assert [[cell.key for cell in row] for row in html.shown(table, {})] == [[None, 3.0, None], [None, None, None]]


def test_settings_with_nearly_the_same_parameters_stand_side_by_side():
    assert scores.offsets([385, 22_000_000, 331_000, 352_000]) == [0, 0, -6, 6]


def test_a_long_history_is_thinned_and_the_caption_says_so(tmp_path):
    ranks = [{"l.0.q": 100 - i, "l.1.q": 100 + i} for i in range(100)]
    folder = write_run(tmp_path, method="adalora", ranks=ranks[-1], nominal_ranks=dict.fromkeys(ranks[0], 200))
    lines = [{"step": 2 * i, "budget": 200, "active": 200, "live": 200, "ranks": ranks[i]} for i in range(100)]
    (folder / "ranks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = charts.rank_map(results.load(tmp_path), None)
    (choice,) = found.choices
    assert len(choice.steps) == charts.MOST_STATES and choice.steps[0] == 0 and choice.steps[-1] == 198
    assert "adalora 40 of 100 recorded steps" in " ".join(found.caption)
    (row, _) = found.panels[0].specification["datasets"]["rows"]
    assert row["r"] == [100 - step // 2 for step in choice.steps]


def test_a_run_without_a_history_has_its_end_on_the_map(tmp_path):
    for seed in (0, 1, 2):
        folder = write_run(tmp_path, method="adalora", seed=seed, **({"ranks": {}} if seed == 1 else {}))
        if seed:
            (folder / "ranks.jsonl").unlink()
    (choice,) = charts.rank_map(results.load(tmp_path), None).choices
    assert choice.seeds == (0, 2)  # of the other nothing is known
    assert {totals[-1] for totals in choice.totals} == {288} and choice.totals[1][0] == 288


def test_rates_that_were_given_up_early_are_pale_and_the_caption_says_so(tmp_path):
    for rate, rung in ((1e-4, 0), (1e-3, 1), (1e-2, 1)):
        path = write_run(tmp_path, rate=rate, phase="sweep", selection_score=80.0) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rung": rung}))
    chart = charts.rate_curves(results.load(tmp_path), None)
    assert [row["early"] for row in chart.panels[0].specification["datasets"]["rows"]] == [True, False, False]
    assert "Pale: given up" in " ".join(chart.caption)


def test_six_methods_eight_seeds_and_four_tasks_stay_under_three_megabytes(tmp_path):
    sites = [site.replace("layer.", f"layer.{k}") for k in ("", "1") for site in BERT_SITES]  # 12 layers
    write_study(tmp_path, seeds=range(8), sites=sites)
    page = rendered(tmp_path)
    assert len(page.encode()) - len(html._bundle()) < (3_000_000 - len(html._bundle())) / 4


def test_a_study_without_ranks_or_scores_has_a_page(tmp_path):
    write_run(tmp_path, method="head", error="collapsed")
    parsed = Page(rendered(tmp_path))
    assert not parsed.specifications
    assert "failed (1 of 1): collapsed" in "".join(parsed.words)


def test_two_parts_are_linked_from_the_head(tmp_path):
    write_run(tmp_path, method="head")
    write_run(tmp_path, method="lora", task="reuters/r8")
    sections = [page.section(part) for part in results.load(tmp_path).parts()]
    parsed = Page(html.render(sections, [replace(BESIDE, title="Over both tasks")], BESIDE))
    assert [a["href"] for a in parsed.all("a")] == ["#main", "#part-1", "#part-2"]
    names = [name for _, name in parsed.headings]
    assert names[1:4] == ["All parts together", "Over both tasks", "Paper against ours"]
    assert "Paper against ours" not in names[4:] and "Over both tasks" in "".join(parsed.words)


# --- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (the extra `test` has it)")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not found or not driver:
        pytest.skip("no Chromium with its driver here (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = found
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    from selenium.common.exceptions import WebDriverException

    try:
        started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    except WebDriverException as error:
        pytest.skip(f"Chromium does not start here: {error.msg}")
    yield started
    started.quit()


@pytest.fixture
def open_page(browser, tmp_path):
    def open_it(text, width=1200):
        path = tmp_path / "report.html"
        path.write_text(text, encoding="utf-8")
        mobile = width < 600
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": mobile}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        for kind in ("browser", "performance"):
            browser.get_log(kind)
        browser.get(path.as_uri())
        wait(browser, "return document.documentElement.dataset.ready === 'true'")
        return browser

    return open_it


@pytest.fixture
def opened(open_page, text):
    return open_page(text)


def wait(browser, condition, seconds=60):
    end = time.monotonic() + seconds
    while not browser.execute_script(condition):
        assert time.monotonic() < end, f"{condition}: not within {seconds} s; {browser.get_log('browser')}"
        time.sleep(0.05)


def one(browser, selector):
    return browser.find_element("css selector", selector)


def map_cells(browser):
    """The ranks that are written in the map, row by row."""
    script = """return new Promise(done => requestAnimationFrame(() => done(
        [...document.querySelectorAll('#p1-rank-map-1 .mark-text.role-mark text')].map(text => {
            const {x, y} = text.getBoundingClientRect();
            return [y, x, text.textContent];
        }))))"""
    return [text for _, _, text in sorted(browser.execute_script(script))]


def expected_cells(ranks):
    kinds = [site.split(".", 4)[4] for site in BERT_SITES[:6]]
    return [tables.decimal(ranks[f"bert.encoder.layer.{layer}.{kind}"]) for kind in kinds for layer in range(6)]


def choose(browser, name, value):
    from selenium.webdriver.support.ui import Select

    Select(one(browser, f".controls [name={name}]")).select_by_visible_text(value)


def column(browser, number):
    script = f"return [...document.querySelectorAll('#p1-comparison tbody tr')].map(row => row.cells[{number}].textContent)"
    return browser.execute_script(script)


def head(browser, name):
    buttons = browser.find_elements("css selector", "#p1-comparison thead button")
    names = [button.text for button in buttons]
    return buttons[names.index(name)], names.index(name)


@pytest.mark.slow
def test_nothing_is_said_on_the_console_and_nothing_is_asked_from_a_network(opened):
    assert opened.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith("data:")] == [opened.current_url]
    assert opened.execute_script("return document.querySelectorAll('.chart svg.marks').length") == 6


@pytest.mark.slow
def test_the_slider_moves_the_map_by_keyboard(opened):
    from selenium.webdriver.common.keys import Keys

    mean = {site: np.mean([final_ranks("adalora", seed)[site] for seed in range(3)]) for site in BERT_SITES}
    assert map_cells(opened) == expected_cells(mean)  # the end is what is shown first
    slider, output = one(opened, ".controls [name=state]"), one(opened, ".shown output")
    assert "step 540 of 540: 288 active ranks" in output.text
    slider.send_keys(Keys.HOME)
    assert map_cells(opened) == ["12"] * 36
    assert slider.get_attribute("aria-valuetext") == "step 0 of 540"
    assert "step 0 of 540: 432 active ranks" in output.text
    slider.send_keys(Keys.ARROW_RIGHT)
    assert slider.get_attribute("aria-valuetext") != "step 0 of 540"
    slider.send_keys(Keys.END)
    assert map_cells(opened) == expected_cells(mean)
    assert opened.get_log("browser") == []


@pytest.mark.slow
def test_setting_and_seed_of_the_map_can_be_chosen(opened):
    choose(opened, "seed", "1")
    assert map_cells(opened) == expected_cells(final_ranks("adalora", 1))
    choose(opened, "setting", "adalora+dora")
    assert map_cells(opened) == expected_cells(final_ranks("adalora+dora", 1))  # the seed is kept
    choose(opened, "setting", "lora")
    assert map_cells(opened) == ["8"] * 36
    assert not one(opened, ".controls [name=state]").is_enabled()
    assert "its ranks do not change" in one(opened, ".shown output").text
    choose(opened, "setting", "lora again")
    assert not one(opened, ".controls [name=seed]").is_enabled()


@pytest.mark.slow
def test_the_table_sorts_by_value_by_mouse(opened):
    button, number = head(opened, "trainable")
    cells = column(opened, number)
    by_value = sorted(cells, key=lambda cell: int(cell.replace(",", "")))
    assert by_value != sorted(cells) and by_value != cells  # as text another order
    button.click()
    assert column(opened, number) == by_value
    assert button.find_element("xpath", "..").get_attribute("aria-sort") == "ascending"
    button.click()
    assert column(opened, number) == by_value[::-1]
    assert button.find_element("xpath", "..").get_attribute("aria-sort") == "descending"
    other, at = head(opened, "setting")
    other.click()
    assert column(opened, at) == sorted(column(opened, at))
    assert len(opened.find_elements("css selector", "#p1-comparison [aria-sort]")) == 1


@pytest.mark.slow
def test_the_table_sorts_by_keyboard_and_what_has_no_value_stays_last(opened):
    from selenium.webdriver.common.keys import Keys

    button, number = head(opened, "difference to full fine-tuning")
    for key, sign in ((Keys.ENTER, 1), (Keys.SPACE, -1)):
        button.send_keys(key)
        *known, last = column(opened, number)
        values = [float(cell.split()[0].replace("\u2212", "-")) for cell in known]
        assert values == sorted(values, key=lambda value: sign * value)
        assert last == "-"
    assert opened.switch_to.active_element == button
    assert opened.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


@pytest.mark.slow
def test_the_first_tab_leads_past_the_head(opened):
    from selenium.webdriver.common.keys import Keys

    one(opened, "body").send_keys(Keys.TAB)
    skip = opened.switch_to.active_element
    assert skip.text == "Skip to the results" and skip.rect["x"] >= 0
    skip.send_keys(Keys.ENTER)
    assert opened.execute_script("return document.activeElement.id") == "main"


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 390, 768])
def test_only_tables_scroll_sideways_on_a_phone(open_page, text, width):
    browser = open_page(text, width)
    browser.execute_script("for (const details of document.querySelectorAll('details')) details.open = true")
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("const box = document.querySelector('.scroll:has(#p1-comparison)');"
                                  "return box.scrollWidth > box.clientWidth")  # fmt: skip
    edges = "return [...document.querySelectorAll('.chart svg.marks')].map(svg => svg.getBoundingClientRect().right)"
    assert max(browser.execute_script(edges)) <= width


@pytest.mark.slow
def test_each_drawing_has_a_role_and_words_for_who_cannot_see_it(opened):
    names = opened.execute_script(
        "return [...document.querySelectorAll('.chart')].map(c => [c.getAttribute('role'), c.getAttribute('aria-label')])"
    )
    assert len(names) == 6
    assert all(role == "group" and len(label) > 40 for role, label in names)


@pytest.mark.slow
def test_print_opens_everything_hides_sliders_and_shows_the_end(opened):
    from selenium.webdriver.common.keys import Keys

    end = map_cells(opened)
    one(opened, ".controls [name=state]").send_keys(Keys.HOME)
    opened.execute_script("""addEventListener('beforeprint', () => { window.seen = [
        document.querySelectorAll('main details:not(.vega-embed details):not([open])').length,
        document.querySelector('.shown output').textContent] })""")
    opened.print_page()
    closed, shown = opened.execute_script("return window.seen")
    assert closed == 0 and "step 540 of 540" in shown
    assert "step 0 of 540" in one(opened, ".shown output").text  # and afterwards all is as it was
    assert opened.execute_script("return document.querySelectorAll('main details[open]').length") == 0

    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        opened.execute_script("dispatchEvent(new Event('beforeprint'))")
        assert map_cells(opened) == end
        assert not one(opened, ".controls").is_displayed()
        assert one(opened, "#p1-rank-map-numbers").is_displayed()
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@pytest.mark.slow
def test_labels_with_markup_are_shown_as_they_are(open_page, tmp_path):
    for method in ("full", "lora", "adalora"):
        write_run(tmp_path, method=method, setting=f"{method} {HOSTILE}", task=HOSTILE)
    lines = [claim(f"lora {HOSTILE}", f"full {HOSTILE}", HOSTILE)]
    browser = open_page(rendered(tmp_path, verdicts=lines))
    assert browser.get_log("browser") == []
    assert not browser.find_elements("id", "planted")
    legend = [e.get_attribute("textContent") for e in browser.find_elements("css selector", ".role-legend-label text")]
    assert any(label.startswith("lora </script><b id=") for label in legend)
    choose(browser, "setting", f"lora {HOSTILE}".strip())
    assert f"lora {HOSTILE}" in one(browser, ".shown output").text


@pytest.mark.parametrize("shift", [25.0, -25.0, 80.0, -80.0])
def test_zero_always_shows_among_the_differences(tmp_path, shift):
    """Settings far from the reference on one side only: the reference's own place is still on the axis."""
    for setting, level in (("lora", 50.0), ("full", 50.0 + shift), ("dora", 50.3)):
        for seed in range(4):
            write_run(tmp_path, method=setting, seed=seed, score=level + 0.1 * seed * (setting != "lora"))
    write_json(tmp_path / "study.json", {"schema": 1, "study": "stsb-minilm", "quick": False, "title": "t", "captions": [],
               "reference": "lora", "methods": ["lora", "full", "dora"], "complete": True})  # fmt: skip
    part = results.load(tmp_path)
    chart = charts.differences(part, verdicts(part))
    [panel] = chart.panels
    layers = panel.specification["layer"]
    domain = layers[0]["encoding"]["x"]["scale"]["domain"]
    assert domain[0] < 0 < domain[1]
    shown = [row["setting"] for row in panel.specification["datasets"]["rows"] if not row["below"]]
    assert "dora" in shown and ("full" in shown) == (shift > -60)
