// The extension: puts a plan bar on each of our nodes, and keeps it true.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { NodePlan } from "./node_plan.js";
import { words } from "./words.js";

const SHOW_BAR = "FluxNF4.Bar.Show";
const DEFAULT_BUDGET = "FluxNF4.Budget.Default";

/**
 * What the server says of our nodes: {class: {aliases, plan: {folder, file, counts: {kind: widget}, budget} or null,
 * taken_by: the folder of another package that has this node's name, or null}}.
 */
let nodes = {};
/** The last report of each node, by its id in the prompt: of any graph that had such a node. */
let reports = {};
/** The report of each node that has run while this page was open. */
const seen = new WeakMap();
const plans = new Map();

const setting = (id) => app.extensionManager?.setting?.get(id);
const locale = () => setting("Comfy.Locale") ?? "en";

/** The server's answer, which may be a problem in words. Anything else that is no success is thrown. */
async function getJson(path) {
  const response = await api.fetchApi(path);
  const answer = await response.json();
  if (!response.ok && !answer.problem) throw new Error(`${path}: ${response.status}`);
  return answer;
}

/** The node with this id in a prompt; "5:3" is node 3 of the subgraph that node 5 is. */
function nodeOf(id) {
  const path = String(id).split(":");
  const last = path.pop();
  let graph = app.rootGraph ?? app.graph;
  for (const step of path) graph = graph?.getNodeById?.(step)?.subgraph;
  return graph?.getNodeById?.(last);
}

function onReport(report) {
  const node = nodeOf(report.node_id);
  const plan = plans.get(node);
  if (plan?.isLowered(report) && !plan.isLowered(seen.get(node))) warnOfLowering(report);
  reports[report.node_id] = report;
  if (node) seen.set(node, report);
  for (const each of plans.values()) each.onReport();
}

function warn(summary, detail, life) {
  app.extensionManager?.toast?.add?.({ severity: "warn", summary, detail, life });
}

function warnOfLowering(report) {
  const { lowered, loweredTitle } = words(locale());
  warn(loweredTitle, lowered(report.resident.length, report.wanted.length), 10_000);
}

function warnOfTakenNames() {
  const { taken, takenTitle } = words(locale());
  const folders = new Set(Object.values(nodes).map(({ taken_by }) => taken_by));
  for (const folder of folders) {
    if (!folder) continue;
    const names = Object.keys(nodes).filter((name) => nodes[name].taken_by === folder);
    warn(takenTitle, taken(folder, names), 30_000);
  }
}

/** What is known of ``node``. Before it ran in this page, only where its file can tell whether a report is of it. */
function reportOf(node) {
  if (seen.has(node) || !nodes[node?.comfyClass]?.plan?.file) return seen.get(node);
  return Object.values(reports).find((report) => nodeOf(report.node_id) === node);
}

/** {width, height} of the pictures that the graph of ``node`` makes, where all of its latents begin with one size. */
function pictureOf(node) {
  const valueOf = (other, name) => other.widgets?.find((widget) => widget.name === name)?.value;
  const sizes = (node.graph?._nodes ?? [])
    .filter(({ outputs }) => outputs?.some(({ type }) => type === "LATENT"))
    .map((other) => ({ width: valueOf(other, "width"), height: valueOf(other, "height") }))
    .filter(({ width, height }) => Number.isInteger(width) && Number.isInteger(height));
  const isOne = new Set(sizes.map(({ width, height }) => `${width}x${height}`)).size === 1;
  return isOne ? sizes[0] : {};
}

function applyDefaultBudget(node, { budget }) {
  const widget = budget && node.widgets?.find(({ name }) => name === budget);
  const value = setting(DEFAULT_BUDGET);
  if (widget && value > 0) widget.value = value; // a loaded graph puts its own in its place
}

app.registerExtension({
  name: "FluxNF4.Plan",
  settings: [
    {
      id: SHOW_BAR,
      category: ["Flux NF4", "Memory plan", "Bar"],
      name: "Show the memory plan on the nodes",
      tooltip: "A bar of the blocks (in VRAM or streamed), the memory they take and what a step costs.",
      type: "boolean",
      defaultValue: true,
      onChange: (isShown) => plans.forEach((plan) => plan.setShown(isShown)),
    },
    {
      id: DEFAULT_BUDGET,
      category: ["Flux NF4", "Memory plan", "Budget"],
      name: "VRAM budget of new nodes (GiB)",
      tooltip: "What vram_budget_gb of a new node begins with. 0 is automatic: as much as ComfyUI has free.",
      type: "number",
      defaultValue: 0,
      attrs: { min: 0, max: 1024, step: 0.25, minFractionDigits: 0, maxFractionDigits: 2 },
    },
  ],

  async init() {
    api.addEventListener("flux_nf4.report", ({ detail }) => onReport(detail));
    api.addEventListener("graphChanged", () => plans.forEach((plan) => plan.refresh()));
  },

  async addCustomNodeDefs(definitions) {
    nodes = await getJson("/flux_nf4/nodes");
    reports = await getJson("/flux_nf4/reports").catch(() => ({})); // without them there is still a plan
    for (const [name, { aliases }] of Object.entries(nodes)) {
      // Older servers do not send them.
      if (definitions[name]) definitions[name].search_aliases ??= aliases;
    }
  },

  setup() {
    warnOfTakenNames();
  },

  nodeCreated(node) {
    const inputs = nodes[node.comfyClass]?.plan;
    if (!inputs || !node.addDOMWidget) return;
    applyDefaultBudget(node, inputs);
    const plan = new NodePlan(node, inputs, { getJson, reportOf, pictureOf, locale });
    plans.set(node, plan);
    if (setting(SHOW_BAR) === false) plan.setShown(false);
    const { onRemoved } = node;
    node.onRemoved = function (...rest) {
      plan.remove();
      plans.delete(node);
      return onRemoved?.apply(this, rest);
    };
  },

  loadedGraphNode(node) {
    plans.get(node)?.refresh();
  },
});
