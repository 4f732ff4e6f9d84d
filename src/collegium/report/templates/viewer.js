// The token viewer: text coloured by expert, all layers of a token, and what an expert is known for.

const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6bb1"];
const AROUND = 8; // tokens of context on either side
const CONTEXTS = 8;

class Viewer {
  constructor(meta, columns) {
    this.meta = meta;
    this.columns = Object.fromEntries(Object.entries(columns).map(([name, column]) => [name, column.values]));
    this.at = (id) => document.getElementById(`viewer-${id}`);
    this.starts = [];
    let start = 0;
    for (const entry of meta.documents) {
      this.starts.push(start);
      start += entry.length;
    }
    this.kept = null; // the token that stays shown
    this.expert = null; // {layer, expert} that is explained
    this.fill();
    this.show();
  }

  fill() {
    this.meta.documents.forEach((entry, i) => {
      const begin = entry.from ? `, from token ${entry.from}` : "";
      const words = `${entry.domain}: document ${entry.document} (${entry.length} tokens${begin})`;
      this.at("document").append(make("option", { value: String(i) }, words));
    });
    this.meta.layers.forEach((entry, i) => {
      this.at("layer").append(make("option", { value: String(i) }, `layer ${entry.layer}`));
    });
    for (const name of ["document", "layer", "colour"]) {
      this.at(name).addEventListener("change", () => {
        if (name === "document") this.keep(null);
        this.show();
      });
    }
    const text = this.at("text");
    text.addEventListener("mouseover", (event) => {
      if (this.kept === null && event.target.dataset.token) this.explainToken(Number(event.target.dataset.token));
    });
    text.addEventListener("click", (event) => {
      const token = event.target.dataset.token;
      if (token !== undefined) this.keep(Number(token) === this.kept ? null : Number(token));
    });
    text.addEventListener("keydown", (event) => this.press(event));
  }

  get document() {
    return Number(this.at("document").value);
  }

  get layer() {
    return this.meta.layers[Number(this.at("layer").value)];
  }

  piece(token) {
    return this.pieceOf(this.columns.token[token]);
  }

  pieceOf(code) {
    return this.meta.texts ? this.meta.texts[code] : String(this.meta.ids[code]);
  }

  /** The experts of a token in a layer with their weights, the largest first. */
  routing(token, layer) {
    const experts = this.columns[`expert_${layer.layer}`];
    const weights = this.columns[`weight_${layer.layer}`];
    const found = [];
    for (let slot = token * layer.slots; slot < (token + 1) * layer.slots; slot++) {
      if (experts[slot] < layer.experts) found.push([experts[slot], (weights[slot] / 127) * layer.scale]);
    }
    return found.sort((a, b) => b[1] - a[1]);
  }

  tokens() {
    const first = this.starts[this.document];
    return Array.from({ length: this.meta.documents[this.document].length }, (_, i) => first + i);
  }

  show() {
    const layer = this.layer;
    const tokens = this.tokens();
    const top = tokens.map((token) => this.routing(token, layer)[0]);
    const colours = this.legend(layer, top);
    const shade = this.at("colour").value === "weight";
    const text = this.at("text");
    text.classList.toggle("ids", !this.meta.texts);
    text.replaceChildren(
      ...tokens.map((token, i) => {
        const span = make("span", { id: `token-${token}`, role: "option", "data-token": String(token) });
        span.textContent = this.visible(this.piece(token));
        const best = top[i];
        span.setAttribute("aria-selected", String(token === this.kept));
        if (!best) return span;
        span.title = `expert ${best[0]}, weight ${best[1].toFixed(2)}`;
        const colour = shade ? "var(--accent)" : colours.get(best[0]);
        const strength = shade ? Math.round(80 * Math.min(best[1] / layer.scale, 1)) : 30;
        if (colour) span.style.background = `color-mix(in srgb, ${colour} ${strength}%, transparent)`;
        if (colour && !shade) span.style.borderBottomColor = colour;
        const explained = this.expert?.layer === layer.layer;
        if (explained && !this.routing(token, layer).some(([id]) => id === this.expert.expert)) span.classList.add("dim");
        if (token === this.kept) span.classList.add("here");
        return span;
      }),
    );
    this.at("text").dataset.layer = String(layer.layer);
  }

  /** A line break is shown as a mark before it breaks the line. */
  visible(piece) {
    return piece.replaceAll("\r", "␍").replaceAll("\n", "⏎\n");
  }

  /** A token on its own, with its spaces made visible. */
  marked(piece) {
    return make("span", { class: "piece" }, this.visible(piece).replaceAll(" ", "␣"));
  }

  /** The most used experts of the text get colours; returns expert -> colour. */
  legend(layer, top) {
    const counts = new Map();
    for (const best of top) if (best) counts.set(best[0], (counts.get(best[0]) ?? 0) + 1);
    const ranked = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]).slice(0, COLOURS.length);
    const colours = new Map(ranked.map(([expert], i) => [expert, COLOURS[i]]));
    this.at("legend").replaceChildren(
      ...ranked.map(([expert, count]) => {
        const button = this.chip(layer, expert, `expert ${expert}: ${Math.round((100 * count) / top.length)} %`);
        button.style.setProperty("--swatch", colours.get(expert));
        return make("li", {}, button);
      }),
    );
    return colours;
  }

  chip(layer, expert, words, part = 0) {
    const pressed = this.expert?.layer === layer.layer && this.expert?.expert === expert;
    const button = make("button", { type: "button", class: "chip", "aria-pressed": String(pressed) }, words);
    button.style.setProperty("--part", `${Math.round(100 * part)}%`);
    button.addEventListener("click", () => this.explainExpert(pressed ? null : { layer: layer.layer, expert }));
    return button;
  }

  keep(token) {
    document.getElementById(`token-${this.kept}`)?.classList.remove("here");
    document.getElementById(`token-${this.kept}`)?.setAttribute("aria-selected", "false");
    this.kept = token;
    const span = document.getElementById(`token-${token}`);
    if (!span) {
      this.at("text").removeAttribute("aria-activedescendant");
      return;
    }
    span.classList.add("here");
    span.setAttribute("aria-selected", "true");
    span.scrollIntoView({ block: "nearest" });
    this.at("text").setAttribute("aria-activedescendant", span.id);
    this.explainToken(token);
  }

  press(event) {
    const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    const tokens = this.tokens();
    if (event.key === "Escape") this.keep(null);
    else if (event.key === "Home") this.keep(tokens[0]);
    else if (event.key === "End") this.keep(tokens.at(-1));
    else if (step) {
      const next = this.kept === null ? tokens[0] : this.kept + step;
      this.keep(Math.min(Math.max(next, tokens[0]), tokens.at(-1)));
    } else return;
    event.preventDefault();
  }

  explainToken(token) {
    this.shown = token;
    const rows = this.meta.layers.map((layer) => {
      const chips = this.routing(token, layer).map(([expert, weight]) =>
        this.chip(layer, expert, `${expert} · ${weight.toFixed(2)}`, Math.abs(weight) / layer.scale),
      );
      const cell = make("td", {}, ...(chips.length ? chips : ["none"]));
      return make("tr", {}, make("th", { scope: "row" }, String(layer.layer)), cell);
    });
    const head = make("thead", {}, make("tr", {}, this.head("layer"), this.head("expert · weight")));
    const piece = this.marked(this.piece(token));
    this.at("token").replaceChildren(
      make("h4", {}, "Token ", piece, ` at position ${this.columns.position[token]}`),
      make("table", {}, head, make("tbody", {}, ...rows)),
    );
  }

  head(words) {
    return make("th", { scope: "col" }, words);
  }

  explainExpert(chosen) {
    this.expert = chosen;
    this.show();
    if (this.shown !== undefined) this.explainToken(this.shown);
    if (!chosen) {
      this.at("expert").replaceChildren();
      return;
    }
    const layer = this.meta.layers.find((entry) => entry.layer === chosen.layer);
    this.at("expert").replaceChildren(
      make("h4", {}, `Layer ${chosen.layer}, expert ${chosen.expert} is known for`),
      this.known(layer, chosen.expert),
      make("h4", {}, "In context"),
      ...this.contexts(layer, chosen.expert),
    );
  }

  /** The tokens that say most about an expert, from the whole trace. */
  known(layer, expert) {
    const rows = [];
    for (let i = expert * this.meta.listed; i < (expert + 1) * this.meta.listed; i++) {
      const count = this.columns[`known_count_${layer.layer}`][i];
      if (!count) continue;
      const piece = this.marked(this.pieceOf(this.columns[`known_${layer.layer}`][i]));
      const part = `${this.columns[`known_part_${layer.layer}`][i]} %`;
      rows.push(make("tr", {}, make("td", {}, piece), make("td", {}, count.toLocaleString("en")), make("td", {}, part)));
    }
    if (!rows.length) return make("p", { class: "how" }, "It was never used.");
    const heads = ["token", "times", "of the token's assignments"].map((words) => this.head(words));
    return make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows));
  }

  /** Where an expert has most weight, in the documents on the page. */
  contexts(layer, expert) {
    const found = [];
    this.meta.documents.forEach((entry, number) => {
      for (let token = this.starts[number]; token < this.starts[number] + entry.length; token++) {
        const slot = this.routing(token, layer).find(([id]) => id === expert);
        if (slot) found.push([slot[1], token, number]);
      }
    });
    found.sort((a, b) => b[0] - a[0]);
    if (!found.length) return [make("p", { class: "how" }, "It is not used in the documents on this page.")];
    return found.slice(0, CONTEXTS).map(([weight, token, number]) => {
      const first = Math.max(this.starts[number], token - AROUND);
      const last = Math.min(this.starts[number] + this.meta.documents[number].length, token + AROUND + 1);
      const words = (from, to) => {
        const pieces = Array.from({ length: to - from }, (_, i) => this.piece(from + i));
        return pieces.join(this.meta.texts ? "" : " ").replaceAll("\n", "⏎");
      };
      const gap = this.meta.texts ? "" : " ";
      const mark = make("mark", {}, words(token, token + 1));
      const where = ` (${this.meta.documents[number].domain}, ${weight.toFixed(2)})`;
      return make("p", { class: "context" }, words(first, token), gap, mark, gap, words(token + 1, last), where);
    });
  }
}
