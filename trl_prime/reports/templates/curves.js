// Charts of a run's metrics: drawn from the page's data, with a crosshair that is the same step in all of them.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const WIDTH = 480, HEIGHT = 190, LEFT = 54, RIGHT = 8, TOP = 8, BOTTOM = 20;
  const DASHES = ["", "6 3", "2 3", "8 3 2 3"];
  const SHOWN = 4; // significant digits
  const manyRuns = data.runs.length > 1;
  const charts = [];
  let smooth = false;

  function svg(name, attributes, parent) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    parent?.append(element);
    return element;
  }

  const styleOf = (series) => ({
    stroke: `var(--c${(manyRuns ? series.run : series.line) % 6})`,
    "stroke-dasharray": DASHES[series.line % DASHES.length],
  });

  const show = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(SHOWN)));
  };

  // Exponential mean over steps: a point that lies a twentieth of the run back counts e times less
  function smoothed({ x, y }, span) {
    let sum = 0, weight = 0;
    return y.map((value, i) => {
      const decay = i ? Math.exp(-(x[i] - x[i - 1]) / (span / 20 || 1)) : 0;
      sum = sum * decay + value;
      weight = weight * decay + 1;
      return sum / weight;
    });
  }

  function ticks(low, high, count) {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
    const found = [];
    for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-9; tick += step) found.push(Math.abs(tick) < step * 1e-9 ? 0 : tick);
    return found;
  }

  function nearest(x, step) {
    let low = 0, high = x.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (x[middle] <= step) low = middle; else high = middle;
    }
    return Math.abs(x[low] - step) <= Math.abs(x[high] - step) ? low : high;
  }

  function makeChart(panel, parent) {
    const figure = document.createElement("figure");
    figure.className = "chart";
    const caption = document.createElement("figcaption");
    const note = document.createElement("span");
    caption.textContent = panel.title;
    note.textContent = panel.note;
    caption.append(note);
    const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: 0, role: "img" });
    picture.setAttribute("aria-label", `${panel.title}: chart over the steps`);
    const values = document.createElement("ul");
    values.className = "values";
    figure.append(caption, picture, values);
    parent.append(figure);

    const steps = panel.series.flatMap((series) => [series.x[0], series.x.at(-1)]);
    const chart = { panel, picture, from: Math.min(...steps), to: Math.max(...steps) };
    chart.place = (step) => LEFT + (chart.to > chart.from ? (step - chart.from) / (chart.to - chart.from) : 0.5) * (WIDTH - LEFT - RIGHT);
    chart.outputs = panel.series.map((series) => {
      const item = document.createElement("li");
      const line = svg("svg", { viewBox: "0 0 22 8", "aria-hidden": "true" }, item);
      svg("path", { d: "M0 4H22", fill: "none", "stroke-width": 2, ...styleOf(series) }, line);
      const name = document.createElement("span");
      name.textContent = [panel.series.length > 1 || !manyRuns ? series.label : "", manyRuns ? data.runs[series.run] : ""].filter(Boolean).join(", ");
      const output = document.createElement("b");
      item.append(name, output);
      values.append(item);
      return output;
    });
    chart.stepOf = (event) => {
      const box = picture.getBoundingClientRect();
      const part = ((event.clientX - box.left) / box.width * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT);
      return chart.from + Math.max(0, Math.min(1, part)) * (chart.to - chart.from);
    };
    const leave = () => point(null);
    picture.addEventListener("pointermove", (event) => point(chart.stepOf(event)));
    picture.addEventListener("pointerdown", (event) => point(chart.stepOf(event)));
    picture.addEventListener("pointerleave", leave);
    picture.addEventListener("blur", leave);
    picture.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") leave();
      if (!by) return;
      event.preventDefault();
      const { x } = panel.series[0];
      const at = pointed === null ? (by > 0 ? -1 : x.length) : nearest(x, pointed);
      point(x[Math.max(0, Math.min(x.length - 1, at + by))]);
    });
    charts.push(chart);
    draw(chart);
  }

  function draw(chart) {
    const { panel, picture, place } = chart;
    picture.replaceChildren();
    let low = Infinity, high = -Infinity;
    for (const series of panel.series) for (const value of series.y) { low = Math.min(low, value); high = Math.max(high, value); }
    if (panel.share) { low = Math.min(0, low); high = Math.max(1, high); }
    if (low === high) { const room = Math.abs(low) * 0.1 || 1; low -= room; high += room; }
    const room = (high - low) * 0.04;
    const y = (value) => TOP + (high + room - value) / (high - low + 2 * room) * (HEIGHT - TOP - BOTTOM);
    for (const tick of ticks(low, high, 4)) {
      svg("path", { class: "axis", d: `M${LEFT} ${y(tick).toFixed(1)}H${WIDTH - RIGHT}` }, picture);
      svg("text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, picture).textContent = show(tick);
    }
    for (const tick of chart.to > chart.from ? ticks(chart.from, chart.to, 6) : [chart.from]) {
      if (Number.isInteger(tick)) svg("text", { x: place(tick), y: HEIGHT - 4, "text-anchor": "middle" }, picture).textContent = show(tick);
    }
    chart.drawn = panel.series.map((series) => {
      const values = smooth ? smoothed(series, chart.to - chart.from) : series.y;
      const path = (ys) => ys.map((value, i) => `${i ? "L" : "M"}${place(series.x[i]).toFixed(1)} ${y(value).toFixed(1)}`).join("");
      if (smooth) svg("path", { class: "raw", ...styleOf(series), d: path(series.y) }, picture);
      svg("path", { class: "line", ...styleOf(series), d: path(values) }, picture);
      if (values.length === 1) svg("circle", { cx: place(series.x[0]), cy: y(values[0]), r: 3, fill: styleOf(series).stroke }, picture);
      return values;
    });
    chart.cross = svg("path", { class: "cross", stroke: "var(--text)", visibility: "hidden" }, picture);
    chart.label = svg("text", { class: "at", y: TOP + 4, visibility: "hidden" }, picture);
    mark(chart);
  }

  let pointed = null;
  function mark(chart) {
    const inside = pointed !== null && pointed >= chart.from && pointed <= chart.to;
    let step = pointed;
    chart.panel.series.forEach((series, i) => {
      const at = inside ? nearest(series.x, pointed) : series.x.length - 1;
      if (inside && i === 0) step = series.x[at];
      chart.outputs[i].textContent = show(chart.drawn[i][at]);
    });
    for (const element of [chart.cross, chart.label]) element.setAttribute("visibility", inside ? "visible" : "hidden");
    if (!inside) return;
    const x = chart.place(step);
    chart.cross.setAttribute("d", `M${x.toFixed(1)} ${TOP}V${HEIGHT - BOTTOM}`);
    const right = x > WIDTH - 90;
    chart.label.setAttribute("x", right ? x - 4 : x + 4);
    chart.label.setAttribute("text-anchor", right ? "end" : "start");
    chart.label.textContent = `step ${show(step)}`;
  }

  function point(step) {
    pointed = step;
    charts.forEach(mark);
  }

  for (const place of document.querySelectorAll("[data-panels]")) {
    for (const panel of data[place.dataset.panels]) makeChart(panel, place);
  }
  document.getElementById("smooth")?.addEventListener("change", (event) => {
    smooth = event.target.checked;
    charts.forEach(draw);
  });
})();
