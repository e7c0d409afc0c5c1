// What the bar shows: the plan for the widgets, and over it what a run with these widgets has shown.

/** Indices of the blocks that stay. */
const residentIn = (blocks) => blocks.flatMap(({ is_resident }, index) => (is_resident ? [index] : []));

/** Whether ``report`` is of a run with the settings that ``answer`` is for. */
function isOf(report, answer) {
  if (!report?.resident) return false;
  if (!answer?.blocks) return !answer?.problem;
  if (report.kinds.length !== answer.blocks.length) return false;
  return answer.device_bytes === null || String(report.wanted) === String(residentIn(answer.blocks));
}

/**
 * @param answer What /flux_nf4/plan said, or null where there is no question.
 * @param report The node's last report, if it has run.
 * @returns The answer, with what is known of ``report`` in its place; ``run`` is the report, if it is of this answer.
 */
export function viewOf(answer, report) {
  if (!isOf(report, answer)) return { ...answer, run: null };
  const stays = new Set(report.resident);
  const blocks = report.kinds.map((kind, index) => ({
    kind,
    nbytes: answer?.blocks?.[index].nbytes ?? 1,
    is_resident: stays.has(index),
  }));
  const { device_bytes, host_bytes, cost } = report;
  return { ...answer, blocks, device_bytes, host_bytes, bytes_per_forward: cost?.copied_bytes ?? null, run: report };
}
