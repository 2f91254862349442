// The page's own script: sorts tables, draws the figures with Vega-Embed, moves the rank maps, prepares for print.

const read = (element) => JSON.parse(element.textContent);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

// --- tables: a button in each head sorts by its column, first up, then down; cells without a value stay last -----------

for (const table of all("table.sortable")) {
  const body = table.tBodies[0];
  const inOrder = [...body.rows];
  for (const button of all("thead button", table)) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const descending = head.getAttribute("aria-sort") === "ascending";
      all("th[aria-sort]", table).forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const numbers = head.classList.contains("number");
      const value = (row) => {
        const cell = row.cells[head.cellIndex];
        if (numbers) return "key" in cell.dataset ? Number(cell.dataset.key) : null;
        const text = cell.textContent.trim();
        return text === "-" ? null : text;
      };
      const compare = numbers ? (a, b) => a - b : (a, b) => a.localeCompare(b, "en", { numeric: true });
      const known = inOrder.filter((row) => value(row) !== null);
      known.sort((a, b) => (descending ? -1 : 1) * compare(value(a), value(b)));
      body.append(...known, ...inOrder.filter((row) => value(row) === null));
    });
  }
}

// --- figures -----------------------------------------------------------------------------------------------------------

const options = {
  mode: "vega-lite",
  renderer: "svg",
  config: read(document.getElementById("chart-config")),
  actions: { export: true, source: false, compiled: false, editor: false },
};
const views = new Map();
for (const source of all("script[data-chart]")) {
  const place = document.getElementById(source.dataset.chart);
  const drawn = await vegaEmbed(place, read(source), { ...options, downloadFileName: source.dataset.chart });
  place.setAttribute("role", "group"); // what is inside has roles of its own now
  views.set(place.id, drawn.view);
}

// --- rank maps: what is chosen above is handed to the drawing ----------------------------------------------------------

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const atMostOneDecimal = (value) => value.toFixed(1).replace(/\.0$/, "");

class RankMap {
  constructor(controls) {
    this.view = views.get(controls.dataset.map);
    this.choices = read(document.querySelector(`script[data-choices="${controls.dataset.map}"]`));
    for (const name of ["setting", "seed", "state"]) this[name] = controls.querySelector(`[name="${name}"]`);
    this.output = controls.parentElement.querySelector("output");
    this.setting.addEventListener("change", () => this.choose());
    this.seed.addEventListener("change", () => this.show());
    this.state.addEventListener("input", () => this.show());
    this.choose();
  }

  get choice() {
    return this.choices[Number(this.setting.value)];
  }

  choose() {
    const { seeds, steps } = this.choice;
    const options = seeds.map((seed, index) => new Option(seed, index));
    if (seeds.length > 1) options.unshift(new Option(`mean of ${seeds.length}`, -1));
    const kept = options.find((option) => option.text === this.seed.selectedOptions[0]?.text);
    this.seed.replaceChildren(...options);
    this.seed.value = (kept ?? options[0]).value;
    this.seed.disabled = options.length < 2;
    this.state.max = steps.length - 1;
    this.state.value = steps.length - 1;
    this.state.disabled = steps.length < 2;
    this.show();
  }

  show() {
    const { setting, seeds, steps, totals } = this.choice;
    const seed = Number(this.seed.value);
    const state = Number(this.state.value);
    const total = mean((seed < 0 ? totals : [totals[seed]]).map((each) => each[state]));
    const where = `step ${steps[state].toLocaleString("en")} of ${steps.at(-1).toLocaleString("en")}`;
    const who = seed < 0 ? `mean of ${seeds.length} seeds` : `seed ${seeds[seed]}`;
    const fixed = steps.length < 2 ? "; its ranks do not change" : "";
    this.state.setAttribute("aria-valuetext", where);
    this.output.textContent = `${setting}, ${who}, ${where}: ${atMostOneDecimal(total)} active ranks${fixed}`;
    this.view.signal("chosen_setting", Number(this.setting.value));
    this.view.signal("chosen_seed", seed);
    this.view.signal("chosen_state", state);
    this.view.run();
  }
}

const maps = all(".controls").map((controls) => new RankMap(controls));

// --- print: everything open, every map at its end ----------------------------------------------------------------------

let restore = [];
addEventListener("beforeprint", () => {
  restore = all("details:not([open])").map((details) => {
    details.open = true;
    return () => (details.open = false);
  });
  for (const map of maps) {
    const state = map.state.value;
    map.state.value = map.state.max;
    map.show();
    restore.push(() => {
      map.state.value = state;
      map.show();
    });
  }
});
addEventListener("afterprint", () => {
  restore.forEach((undo) => undo());
  restore = [];
});

document.documentElement.dataset.ready = "true";
