"use strict";
// The charts (by uPlot) of what stands in an element, and the slider over its samples; `update` shows other numbers in them,
// `close` lets go of the element, for a page that shows another one in its place.
function report(root, data) {
  const plots = new Map();  // by the element in which it stands
  const dashes = [6, 4], height = 240, some = 60;  // points above which a curve is smoothed
  let along = "step";

  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const figure = v => v == null ? "–" : v === 0 ? "0" : Math.abs(v) >= 1e5 ? compact(v) : Math.abs(v) < 1e-3 ? (+v.toPrecision(3)).toExponential() : String(+v.toPrecision(4));
  const compact = v => Math.abs(v) >= 1e9 ? +(v / 1e9).toPrecision(3) + "G" : Math.abs(v) >= 1e6 ? +(v / 1e6).toPrecision(3) + "M" : Math.abs(v) >= 1e4 ? +(v / 1e3).toPrecision(4) + "k" : String(+v.toPrecision(6));

  // A line's points: its own, or a column of a run's log against steps, images or hours.
  function points(line) {
    if (line.x) return [line.x, line.y];
    const group = data.runs[line.run].find(g => line.name in g.y);
    return [group.x[along], group.y[line.name]];
  }

  // The mean of each point's neighbours, as many on either side.
  function smooth(y) {
    const w = Math.max(2, Math.round(y.length / 60));
    return y.map((_, k) => {
      const r = Math.min(w, k, y.length - 1 - k), part = y.slice(k - r, k + r + 1);
      return part.reduce((a, b) => a + b, 0) / part.length;
    });
  }

  function options(chart, width) {
    const ink = colour("--soft"), grid = { stroke: colour("--line"), width: 1 }, series = [{ label: chart.own || along, value: (u, _, k, at) => compact(before(u.data[0], at)) }], tables = [];
    for (const line of chart.lines) {
      const [x, y] = points(line), many = y.length > some, stroke = colour("--c" + line.colour % 8);
      const common = { stroke, dash: line.dash ? dashes : undefined, spanGaps: true, points: { show: y.length < 3 } };
      if (many) { tables.push([x, y]); series.push({ ...common, label: "", width: 1, alpha: .28, faint: true }); }
      tables.push([x, many ? smooth(y) : y]);
      series.push({ ...common, label: line.label, width: 2, value: (u, _, k, at) => figure(before(u.data[k], at)) });
    }
    const joined = uPlot.join(tables), log = chart.log && positive(tables) ? 3 : 1;
    const font = "12px " + getComputedStyle(document.body).fontFamily, axis = { stroke: ink, grid, ticks: { show: false }, font, gap: 6 };
    const names = (_, ticks) => ticks.map(v => v == null ? "" : compact(v));
    return [{
      width, height, series, cursor: { points: { size: 7 }, y: false, drag: { x: true, y: false } },
      scales: { x: { time: false, distr: chart.xlog ? 3 : 1 }, y: { distr: log, range: log === 3 ? (_, a, b) => span(a, b) : undefined } },
      axes: [{ ...axis, values: names, space: 60, size: 28 }, { ...axis, values: (_, t) => t.map(v => v == null ? "" : figure(v)), size: 54, space: 34, splits: log === 3 ? (_, i, a, b) => ticks(a, b) : undefined, filter: (_, s) => s }],
      legend: { markers: { width: 0, fill: (_, k) => series[k].stroke } },
      hooks: { ready: [u => u.root.querySelectorAll(".u-legend .u-series").forEach((row, k) => { if (series[k].faint) row.style.display = "none"; })] },
    }, joined];
  }

  // Whether a logarithm shows values better: all are above 0, and the largest is far above the smallest.
  function positive(tables) {
    const all = tables.flatMap(([, y]) => y), least = Math.min(...all);
    return least > 0 && Math.max(...all) > 4 * least;
  }
  const span = (a, b) => [a / 1.12, b * 1.12];

  // Round numbers of a logarithmic axis: few in a wide range, more in a narrow one.
  function ticks(a, b) {
    const found = [], wide = Math.log10(b / a), steps = wide > 5 ? [1] : wide > 2 ? [1, 3] : wide > .9 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 8];
    const every = wide > 7 ? 2 : 1;
    for (let k = Math.floor(Math.log10(a)); k <= Math.log10(b); k++) for (const m of steps) { const v = +(m * 10 ** k).toPrecision(3); if (v >= a && v <= b && k % every === 0) found.push(v); }
    return found;
  }

  // The value at a place, or the last one before it; without a place, the last of all.
  function before(values, at) {
    let k = at ?? values.length - 1;
    while (k > 0 && values[k] == null) k--;
    return values[k];
  }

  function draw(box) {
    plots.get(box)?.destroy();
    const [how, joined] = options(data.charts[box.dataset.chart], box.clientWidth);
    plots.set(box, new uPlot(how, joined, box));
    box.setAttribute("role", "img");
    box.setAttribute("aria-label", data.charts[box.dataset.chart].title);
  }

  const ended = new AbortController(), listening = { signal: ended.signal };
  const all = [...root.querySelectorAll("[data-chart]")];
  const redraw = () => all.filter(box => box.clientWidth).forEach(draw);  // those in closed details have no width yet
  redraw();
  const watch = new ResizeObserver(changes => requestAnimationFrame(() => changes.forEach(({ target }) => {
    const plot = plots.get(target), width = target.clientWidth;
    if (!width) return;
    if (!plot) draw(target); else if (plot.width !== width) plot.setSize({ width, height });
  })));
  all.forEach(box => watch.observe(box));

  for (const button of root.querySelectorAll("[data-x]")) button.onclick = () => {
    along = button.dataset.x;
    root.querySelectorAll("[data-x]").forEach(b => b.setAttribute("aria-pressed", b.dataset.x === along));
    redraw();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw, listening);

  // Paper is white, and has no folds.
  addEventListener("beforeprint", () => {
    document.documentElement.classList.add("printed");
    root.querySelectorAll("details.run").forEach(fold => { fold.open = true; });
    redraw();
  }, listening);
  addEventListener("afterprint", () => { document.documentElement.classList.remove("printed"); redraw(); }, listening);

  for (const input of root.querySelectorAll(".slide input")) input.oninput = () => {
    const frames = [...input.closest("section").querySelectorAll(".frame")];
    frames.forEach((frame, k) => { frame.hidden = k !== +input.value; });
    input.nextElementSibling.textContent = "step " + frames[+input.value].dataset.step;
  };

  return {
    update(runs) {
      data.runs = runs;
      for (const [box, plot] of plots) plot.setData(options(data.charts[box.dataset.chart], box.clientWidth)[1]);
    },
    close() {
      ended.abort();
      watch.disconnect();
      plots.forEach(plot => plot.destroy());
    },
  };
}

const held = document.getElementById("data");
if (held) report(document, JSON.parse(held.textContent));
