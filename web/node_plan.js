// A node's plan: asks the server when one of the node's widgets changes, and shows the answer.

import { PlanBar } from "./plan_bar.js";
import { viewOf } from "./plan_view.js";

export class NodePlan {
  /**
   * @param node The LiteGraph node.
   * @param inputs Names of the widgets that the plan depends on: {folder, file, counts: {kind: widget}, budget}.
   * @param page What this needs of the page: getJson(path), reportOf(node), pictureOf(node), locale().
   */
  constructor(node, inputs, page) {
    Object.assign(this, { node, page, folder: inputs.folder });
    /** The name of the widget for each word of the question; null where the node has none. */
    this.widgets = { file: inputs.file, ...inputs.counts, budget: inputs.budget };
    this.bar = new PlanBar(page.locale());
    this.isShown = true;
    this.answer = null;
    this.shownQuery = null;
    this.isAsking = false;
    this.height = 0;
    this.resizes = new ResizeObserver(() => this.onResize());
    this.resizes.observe(this.bar.content);
    this.widget = node.addDOMWidget("flux_nf4_plan", "flux_nf4_plan", this.bar.element, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => this.layoutHeight(),
      getMaxHeight: () => this.layoutHeight(),
    });
    this.widget.serialize = false;
    for (const word of Object.keys(this.widgets)) this.watch(this.widgetOf(word));
    queueMicrotask(() => this.refresh()); // not before the node has its values
  }

  widgetOf(word) {
    const name = this.widgets[word];
    return name && this.node.widgets?.find((widget) => widget.name === name);
  }

  watch(widget) {
    if (!widget) return;
    const { callback } = widget;
    widget.callback = (...rest) => {
      const result = callback?.apply(widget, rest);
      this.refresh();
      return result;
    };
  }

  /** Not by the widget's own ``hidden``: some versions of the page never show a widget again that began with it. */
  setShown(isShown) {
    this.isShown = isShown;
    this.bar.content.hidden = !isShown;
    this.fit();
    if (isShown) this.refresh();
  }

  /** Ask for the plan of what the widgets say now, if it is not the one on show. One question at a time. */
  async refresh() {
    if (this.isAsking || !this.isShown) return;
    this.isAsking = true;
    try {
      for (let query; (query = this.query()) !== this.shownQuery; ) {
        this.answer = query.startsWith("?") ? await this.page.getJson(`/flux_nf4/plan${query}`) : null;
        this.shownQuery = query;
        this.show();
      }
    } catch {
      // The server is away. The page says so itself, and the next change asks again.
    } finally {
      this.isAsking = false;
    }
  }

  /** The question to the server, or why there is none: "linked", "no file". */
  query() {
    if (!this.widgets.file) return "no file";
    const values = { folder: this.folder };
    for (const [word, name] of Object.entries(this.widgets)) {
      if (!name) continue;
      if (this.isLinked(name)) return "linked";
      values[word] = this.widgetOf(word)?.value ?? "";
    }
    const report = this.page.reportOf(this.node);
    if (report) values.node = report.node_id; // what it has measured counts first
    Object.assign(values, this.page.pictureOf(this.node)); // what was measured at that size is better still
    return `?${new URLSearchParams(values)}`;
  }

  isLinked(name) {
    const slot = this.node.inputs?.findIndex((input) => input.widget?.name === name) ?? -1;
    return slot >= 0 && this.node.isInputConnected(slot);
  }

  onReport() {
    this.shownQuery = null; // what runs on this machine show changes every prediction
    this.show();
    this.refresh();
  }

  /** Whether fewer blocks stay than the widgets ask for; where they ask for all that fits, never. */
  isLowered(report) {
    return Boolean(report?.is_lowered) && this.answer?.advice?.code !== "automatic";
  }

  show() {
    const report = this.page.reportOf(this.node);
    this.bar.show(viewOf(this.answer, report), this.isLowered(report), this.shownQuery);
  }

  onResize() {
    const height = this.bar.content.offsetHeight;
    if (!height || height === this.height) return; // 0: not on the page now
    this.height = height;
    this.fit();
  }

  /** Height that the canvas renderer is to keep for the bar; it asks at every frame, so nothing is measured here. */
  layoutHeight() {
    return this.isShown ? this.height + 2 * (this.widget?.margin ?? 10) : 0;
  }

  remove() {
    this.resizes.disconnect();
  }

  /** Give the node the height that the bar needs now. */
  fit() {
    const [width, height] = this.node.size;
    const least = this.node.computeSize([width, height])[1]; // a copy: it writes the least size into what it is given
    if (least > height || !this.isShown) this.node.setSize([width, least]);
    this.node.setDirtyCanvas?.(true, false);
  }
}
