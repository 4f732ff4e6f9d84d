// The figures: Vega-Lite views with native controls, keyboard and downloads.

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const NARROW = 480; // pixels; below, the names of the lines stand under one another
const PAPER = 660; // pixels; width of a plot in print, where one of the screen's width would have tiny letters

class Plot {
  constructor(element, figure, columns, config) {
    Object.assign(this, { element, figure, columns, config });
    this.place = element.querySelector(".plot");
    this.chosen = figure.choices.map((choice) => choice.values[0]);
    this.cursor = null;
    for (const select of element.querySelectorAll("[data-choice]")) {
      select.addEventListener("change", () => this.choose(Number(select.dataset.choice), Number(select.value)));
    }
    for (const button of element.querySelectorAll("[data-save]")) {
      button.addEventListener("click", () => this.save(button.dataset.save));
    }
    if (figure.readout.length) {
      this.place.addEventListener("keydown", (event) => this.press(event));
      this.place.addEventListener("focus", () => this.point(this.cursor ?? [0, 0]));
      this.place.addEventListener("blur", () => this.mark(null, null));
    }
  }

  /** The rows to draw, with what is chosen; all of them, as they are, if `all`. */
  rows(all = false) {
    const names = Object.keys(this.columns);
    const tests = [];
    const copies = [];
    this.figure.choices.forEach((choice, i) => {
      if (choice.copies) copies.push([choice.name, this.chosen[i]]);
      else if (!all) tests.push([this.columns[choice.name], this.chosen[i]]);
    });
    const rows = [];
    const length = this.columns[names[0]].values.length;
    for (let i = 0; i < length; i++) {
      if (!tests.every(([column, value]) => valueAt(column, i) === value)) continue;
      const row = {};
      for (const name of names) row[name] = valueAt(this.columns[name], i);
      if (!all) for (const [name, from] of copies) row[name] = row[from];
      rows.push(row);
    }
    return rows;
  }

  /** Draw as the screen asks for, or for `paper`: light, and as wide as a page. */
  async draw(paper = false) {
    const drawn = this.rows();
    this.index(drawn);
    const config = this.config[paper ? "light" : theme.name];
    const columns = !paper && this.place.clientWidth < NARROW ? 1 : config.legend.columns;
    const spec = {
      ...this.figure.spec,
      ...(paper ? { width: PAPER, autosize: { type: "fit-x", contains: "padding" } } : { width: "container" }),
      config: { ...config, legend: { ...config.legend, columns } },
      data: { name: "table", values: drawn },
    };
    const options = { mode: "vega-lite", actions: false, renderer: "canvas", tooltip: { theme: theme.name } };
    this.view?.finalize();
    this.view = (await vegaEmbed(this.place, spec, options)).view;
    this.element.dataset.ready = "true";
  }

  async choose(choice, option) {
    this.chosen[choice] = this.figure.choices[choice].values[option];
    const rows = this.rows();
    this.index(rows);
    this.cursor = null;
    this.mark(null, null);
    await this.view.data("table", rows).runAsync();
    this.element.dataset.drawn = String(Number(this.element.dataset.drawn ?? 0) + 1);
  }

  /** Where each cell is, for the keyboard: axis values in the order they are drawn. */
  index(rows) {
    if (!this.figure.readout.length) return;
    const [x, y] = this.figure.readout.map((field) => field.column);
    this.xs = [...new Set(rows.map((row) => row[x]))].sort((a, b) => a - b);
    this.ys = [...new Set(rows.map((row) => row[y]))];
    this.cells = new Map(rows.map((row) => [`${row[x]} ${row[y]}`, row]));
  }

  press(event) {
    const [x, y] = this.cursor ?? [0, 0];
    const row = { Home: [0, y], End: [this.xs.length - 1, y] }[event.key];
    const step = ARROWS[event.key];
    if (!row && !step) return;
    event.preventDefault();
    this.point(row ?? [x + step[0], y + step[1]]);
  }

  /** Mark the cell at these places of the axes and read it out. */
  point([x, y]) {
    if (!this.view || !this.xs.length) return;
    this.cursor = [Math.min(Math.max(x, 0), this.xs.length - 1), Math.min(Math.max(y, 0), this.ys.length - 1)];
    const [cellX, cellY] = [this.xs[this.cursor[0]], this.ys[this.cursor[1]]];
    this.mark(cellX, cellY);
    const row = this.cells.get(`${cellX} ${cellY}`);
    const fields = this.figure.readout.filter((field) => !row || field.column in row);
    const words = row
      ? fields.map((field) => `${field.title}: ${this.words(row[field.column], field.format)}`)
      : [`no cell at ${cellX}, ${cellY}`];
    this.element.querySelector(".readout").textContent = words.join("; ");
  }

  words(value, format) {
    if (value === null) return "none";
    return format ? this.view.locale().format(format)(value) : String(value);
  }

  mark(x, y) {
    this.view?.signal("cursor_x", x).signal("cursor_y", y).runAsync();
  }

  async save(kind) {
    const name = `${this.figure.name}.${kind}`;
    if (kind === "csv") save(new Blob([this.csv()], { type: "text/csv" }), name);
    else if (kind === "svg") save(new Blob([await this.view.toSVG()], { type: "image/svg+xml" }), name);
    else save(await (await fetch(await this.view.toImageURL("png", 2))).blob(), name);
  }

  csv() {
    const names = Object.keys(this.columns);
    const quote = (value) => (typeof value === "string" ? `"${value.replaceAll('"', '""')}"` : (value ?? ""));
    const lines = this.rows(true).map((row) => names.map((name) => quote(row[name])).join(","));
    return [names.join(","), ...lines, ""].join("\n");
  }
}

/** Draw every figure of the page, in order, and again when the theme changes. */
async function drawFigures(meta) {
  const columns = await readBlock("figure-data");
  const plots = meta.figures.map((figure) => {
    const own = {};
    for (const name of figure.columns) own[name] = columns[`${figure.name}/${name}`];
    return new Plot(document.getElementById(`figure-${figure.name}`), figure, own, meta.config);
  });
  const drawAll = async () => {
    for (const plot of plots) await plot.draw();
  };
  await drawAll();
  theme.changed.push(drawAll);
  // nothing in a drawing waits for the network or a clock, so all of it is done before the pages are laid out
  addEventListener("beforeprint", () => plots.forEach((plot) => plot.draw(true)));
  addEventListener("afterprint", drawAll);
}
