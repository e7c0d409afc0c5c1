// What the bar says, in the languages that we have.

const GIB = 2 ** 30;

const fixed = (value, digits) => value.toFixed(digits);
const gib = (bytes) => `${fixed(bytes / GIB, 2)} GiB`;
const gb = (bytes) => `${fixed(bytes / 1e9, 2)} GB`;
const ms = (value) => `${fixed(value, value < 100 ? 1 : 0)} ms`;

/** " (1024x768)" of [1024, 768]. */
const sizeOf = (picture) => (picture ? ` (${picture.join("x")})` : "");

/** "5 double and 9 single" of {double: 5, single: 9}. */
const listOf = (counts, and, before = "", after = "") =>
  Object.entries(counts)
    .map(([kind, count]) => `${count} ${before}${kind}${after}`)
    .join(and);

/** Rows of [term, value] for a view of `viewOf`, in the words of ``say``. */
function figuresIn(say) {
  return ({ device_bytes, least_device_bytes, most_device_bytes, host_bytes, all_host_bytes, bytes_per_forward, compute_ms, stall_ms, picture, run }) => {
    const rows = [];
    if (device_bytes != null) rows.push(["VRAM", gib(device_bytes)]);
    else rows.push(["VRAM", say.from(gib(least_device_bytes), gib(most_device_bytes))]);
    rows.push([say.ram, run ? say.pinned(gib(host_bytes), run.pinned_bytes / host_bytes) : gib(host_bytes)]);
    if (all_host_bytes) rows.push([say.allRam, gib(all_host_bytes)]);
    if (bytes_per_forward != null) rows.push([say.perStep, gb(bytes_per_forward)]);
    if (run?.link_gbps) rows.push([say.bus, `${fixed(run.link_gbps, 1)} GB/s`]);
    if (run?.cost?.total_ms) rows.push([say.measured, say.step(ms(run.cost.total_ms), ms(run.cost.stall_ms)) + sizeOf(run.cost.picture)]);
    else if (compute_ms != null) rows.push([say.predicted, say.step(ms(compute_ms + stall_ms), ms(stall_ms)) + sizeOf(picture)]);
    if (run?.int8) rows.push(["int8", say.int8(run.int8, fixed(run.int8.times, 2))]);
    return rows;
  };
}

const en = {
  title: "Memory plan",
  blocks: (counts) =>
    Object.entries(counts)
      .map(([kind, [resident, all]]) =>
        resident === null ? `${all} ${kind} blocks` : `${resident} of ${all} ${kind} blocks in VRAM, ${all - resident} streamed`,
      )
      .join("; "),
  key: (isOpen) => (isOpen ? "blocks" : "in VRAM (low: streamed)"),
  figures: figuresIn({
    ram: "RAM",
    allRam: "RAM in total",
    perStep: "Bus, each step",
    bus: "Bus",
    measured: "Step",
    predicted: "Step, predicted",
    from: (least, most) => `${least} to ${most}`,
    pinned: (size, share) => `${size}, ${share >= 1 ? "pinned" : `${fixed(100 * share, 0)} % pinned`}`,
    step: (total, stall) => `${total}, of which ${stall} waiting`,
    int8: ({ is_used, faster, measured }, times) =>
      is_used ? `${faster} of ${measured} kinds of layers, ${times} times as fast` : `would be ${times} times as fast (compute)`,
  }),
  advice: (code, f, kept = {}) =>
    ({
      all_resident: () => "All blocks stay in VRAM: nothing is streamed.",
      automatic: () => "Automatic: ComfyUI's free VRAM decides when the model is loaded.",
      not_measured: () => "Run it once: this machine's bus and GPU are measured, not guessed.",
      keeps_up: () => `The bus keeps up (${fixed(f.gbps, 0)} GB/s): more blocks in VRAM would gain little.`,
      not_pinned: () =>
        `Not all RAM is pinned, and waiting for the slower bus takes ${fixed(f.percent, 0)} % of a step: unload other models, or see the log.`,
      slow_link: () =>
        `The bus is slow (${fixed(f.gbps, 1)} GB/s), and waiting for it takes ${fixed(f.percent, 0)} % of a step: check that the card ` +
        "sits in a full-width slot.",
      more_vram: () =>
        `The bus is the limit (${fixed(f.gbps, 0)} GB/s), and waiting for it takes ${fixed(f.percent, 0)} % of a step: let more blocks ` +
        "stay, with a larger budget or fewer other programs on the GPU.",
      bus_is_limit: () =>
        `The bus is the limit (${fixed(f.gbps, 0)} GB/s): ${f.gib} GiB more, with ${listOf(kept, " and ")} blocks in VRAM, ` +
        `would save ${fixed(f.percent, 0)} %.`,
      budget_too_small: () => `The budget is too small: with every block streamed it takes ${fixed(f.gib, 2)} GiB.`,
    })[code]?.() ?? "",
  notAsked: "A value comes from a link: the plan is known when it runs.",
  noFileYet: "What stays in VRAM and what a step costs is shown here once it has run.",
  takenTitle: "Another package has taken nodes of Flux NF4",
  taken: (folder, names) =>
    `The package in custom_nodes/${folder} was loaded later and has registered ${names.join(", ")}, too: graphs get its nodes. ` +
    "To use ours, remove or disable that folder and restart ComfyUI.",
  loweredTitle: "Fewer blocks stay in VRAM",
  lowered: (now, before) => `The GPU has room for ${now} of ${before} blocks; the others are streamed. The picture is the same.`,
};

const zh = {
  title: "显存计划",
  blocks: (counts) =>
    Object.entries(counts)
      .map(([kind, [resident, all]]) =>
        resident === null ? `${all} 个 ${kind} 块` : `${all} 个 ${kind} 块：${resident} 个常驻显存，${all - resident} 个流式传输`,
      )
      .join("；"),
  key: (isOpen) => (isOpen ? "块" : "常驻显存（矮的：流式传输）"),
  figures: figuresIn({
    ram: "内存",
    allRam: "内存总计",
    perStep: "每步传输",
    bus: "总线",
    measured: "每步",
    predicted: "每步（预测）",
    from: (least, most) => `${least} 至 ${most}`,
    pinned: (size, share) => `${size}，${share >= 1 ? "已锁页" : `${fixed(100 * share, 0)} % 已锁页`}`,
    step: (total, stall) => `${total}，其中等待 ${stall}`,
    int8: ({ is_used, faster, measured }, times) =>
      is_used ? `${measured} 种层中的 ${faster} 种，速度为 ${times} 倍` : `速度可达 ${times} 倍（见“计算方式”）`,
  }),
  advice: (code, f, kept = {}) =>
    ({
      all_resident: () => "所有块都常驻显存，无需传输。",
      automatic: () => "自动：加载模型时由 ComfyUI 的空闲显存决定。",
      not_measured: () => "请先运行一次：总线和显卡的速度是测出来的，不是猜的。",
      keeps_up: () => `总线跟得上（${fixed(f.gbps, 0)} GB/s）：再增加常驻块收益很小。`,
      not_pinned: () => `内存未全部锁页，总线变慢，等待占每步的 ${fixed(f.percent, 0)} %：请卸载其他模型，或查看日志。`,
      slow_link: () =>
        `总线较慢（${fixed(f.gbps, 1)} GB/s），等待占每步的 ${fixed(f.percent, 0)} %：请检查显卡是否插在全宽插槽上。`,
      more_vram: () =>
        `瓶颈是总线（${fixed(f.gbps, 0)} GB/s），等待占每步的 ${fixed(f.percent, 0)} %：请让更多块常驻，例如加大预算，或关闭占用显存的其他程序。`,
      bus_is_limit: () =>
        `瓶颈是总线（${fixed(f.gbps, 0)} GB/s）：再多用 ${f.gib} GiB 显存（${listOf(kept, "、", "个 ", " 块")}常驻），` +
        `可节省 ${fixed(f.percent, 0)} %。`,
      budget_too_small: () => `预算太小：即使全部流式传输也需要 ${fixed(f.gib, 2)} GiB。`,
    })[code]?.() ?? "",
  notAsked: "有数值来自连线：运行后才知道计划。",
  noFileYet: "运行一次后，这里会显示哪些块常驻显存以及每步的开销。",
  takenTitle: "另一个扩展占用了 Flux NF4 的节点",
  taken: (folder, names) =>
    `custom_nodes/${folder} 中的扩展加载得更晚，也注册了 ${names.join("、")}：工作流会使用它的节点。` +
    "要使用本扩展的节点，请移除或禁用该文件夹并重启 ComfyUI。",
  loweredTitle: "常驻显存的块减少了",
  lowered: (now, before) => `显存只放得下 ${before} 个块中的 ${now} 个，其余流式传输。图像不变。`,
};

export function words(locale) {
  return String(locale).startsWith("zh") ? zh : en;
}
