// The bar itself: one element that shows an answer of /flux_nf4/plan and a report. Knows nothing of ComfyUI.

import { words } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 1000;
const HEIGHT = 20;
const GAP = 2; // between blocks
const GROUP_GAP = 10; // between blocks of different kinds
const COLOURS = 4; // that plan_bar.css has for kinds

const style = document.createElement("link");
style.rel = "stylesheet";
style.href = new URL("./plan_bar.css", import.meta.url).href;
document.head.append(style);

function make(tag, className, parent) {
  const element = document.createElement(tag);
  element.className = className;
  parent?.append(element);
  return element;
}

/** The class that gives a kind of block its colour: by its place among the kinds of the model. */
const colourOf = (kind, kinds) => `kind-${kinds.indexOf(kind) % COLOURS}`;

/** Rectangles of the blocks, as wide as they weigh, by what they are: {"kind-0 resident": "M0 0h9v20h-9z ...", ...}. */
export function shapesOf(blocks) {
  const kinds = Object.keys(countsOf(blocks));
  const total = blocks.reduce((sum, { nbytes }) => sum + nbytes, 0);
  const scale = (WIDTH - GROUP_GAP - GAP * blocks.length) / total;
  const shapes = {};
  let x = 0;
  blocks.forEach(({ kind, nbytes, is_resident }, index) => {
    if (index && blocks[index - 1].kind !== kind) x += GROUP_GAP;
    const state = is_resident === null ? "open" : is_resident ? "resident" : "streamed";
    const width = nbytes * scale;
    // Streamed blocks are half as high: the difference is not in the colour alone.
    const [top, height] = state === "streamed" ? [HEIGHT / 2, HEIGHT / 2] : [0, HEIGHT];
    const key = `${colourOf(kind, kinds)} ${state}`;
    shapes[key] = `${shapes[key] ?? ""}M${x.toFixed(1)} ${top}h${width.toFixed(1)}v${height}h-${width.toFixed(1)}z`;
    x += width + GAP;
  });
  return shapes;
}

export class PlanBar {
  constructor(locale) {
    this.words = words(locale);
    this.element = make("div", "flux-nf4-plan");
    this.content = make("div", "flux-nf4-content", this.element);
    this.content.setAttribute("role", "group");
    this.content.setAttribute("aria-label", this.words.title);
    this.content.tabIndex = 0;
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("role", "img");
    this.content.append(this.svg);
    this.key = make("p", "key", this.content);
    this.figures = make("dl", "", this.content);
    this.advice = make("p", "", this.content);
    this.advice.setAttribute("role", "status");
  }

  /**
   * @param view What `viewOf` made of an answer and a report.
   * @param isLowered Whether fewer blocks stay than were asked for.
   * @param query The question, or why there is none.
   */
  show(view, isLowered, query) {
    this.content.classList.toggle("problem", Boolean(view.problem));
    this.drawBlocks(view.blocks ?? []);
    this.writeFigures(view.blocks ? this.words.figures(view) : []);
    this.advice.textContent = this.sentence(view, isLowered, query);
  }

  drawBlocks(blocks) {
    this.svg.style.display = blocks.length ? "" : "none"; // else it would be a picture of nothing
    this.svg.replaceChildren();
    for (const [className, d] of Object.entries(shapesOf(blocks))) {
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("class", className);
      path.setAttribute("d", d);
      this.svg.append(path);
    }
    const counts = countsOf(blocks);
    this.svg.setAttribute("aria-label", this.words.blocks(counts));
    this.key.replaceChildren();
    for (const [kind, [resident, all]] of Object.entries(counts)) {
      make("span", colourOf(kind, Object.keys(counts)), this.key).textContent = resident === null ? `${all} ${kind}` : `${resident} / ${all} ${kind}`;
    }
    if (blocks.length) this.key.append(this.words.key(blocks[0].is_resident === null));
  }

  writeFigures(rows) {
    this.figures.replaceChildren();
    for (const [term, value] of rows) {
      const row = make("div", "", this.figures);
      make("dt", "", row).textContent = term;
      make("dd", "", row).textContent = value;
    }
  }

  sentence({ problem, advice, run }, isLowered, query) {
    if (problem) return problem;
    if (run && isLowered) return this.words.lowered(run.resident.length, run.wanted.length);
    const next = run && (!advice || advice.code === "automatic") ? run.advice : advice; // what the run shows, where no plan does
    if (next) return this.words.advice(next.code, next.figures, next.kept);
    if (run) return "";
    return query === "linked" ? this.words.notAsked : this.words.noFileYet;
  }
}

/** {kind: [resident, all]}; resident is null where that is decided when the model is loaded. */
export function countsOf(blocks) {
  const counts = {};
  for (const { kind, is_resident } of blocks) {
    counts[kind] ??= [is_resident === null ? null : 0, 0];
    counts[kind][0] = is_resident === null ? null : counts[kind][0] + is_resident;
    counts[kind][1] += 1;
  }
  return counts;
}
