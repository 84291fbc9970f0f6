// Line charts as inline SVG, drawn at the width they have, so that text keeps its size on a phone.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

/** An SVG element with attributes; `color` becomes a CSS stroke, so that variables follow dark and light. */
function svg(name, attributes = {}, color = null, parent = null) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (color) element.style[name === "text" ? "fill" : "stroke"] = color;
  if (parent) parent.append(element);
  return element;
}

/** An HTML element with a class and text; never HTML from data. */
function html(name, className = "", text = null, parent = null) {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text !== null) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

/** 1234567 as "1.23 M"; `digits` significant ones. */
function short(value, digits = 3) {
  if (value === null || !isFinite(value)) return "–";
  for (const [size, sign] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(value) >= size * 0.9995) return `${Number((value / size).toPrecision(digits))} ${sign}`;
  return String(Number(value.toPrecision(digits)));
}

/** About `count` round numbers from `low` to `high`. */
function linearTicks(low, high, count) {
  const raw = (high - low) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.999);
  const ticks = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + (high - low) * 1e-3 && ticks.length < 99; index++) ticks.push(index * step);
  return ticks;
}

/** Round numbers for a logarithmic axis: powers of ten, with 2 and 5 between them where they are few. */
function logTicks(low, high, count) {
  for (const factors of [[1, 2, 3, 5], [1, 2, 5], [1, 3], [1]]) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const factor of factors) {
        const tick = factor * 10 ** power;
        if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
      }
    if (factors.length === 1 || (ticks.length <= count && ticks.length >= 2)) {
      const keep = Math.ceil(ticks.length / Math.max(count, 1));
      if (ticks.length >= 2) return ticks.filter((_, index) => index % keep === 0);
    }
  }
  return linearTicks(low, high, count).filter((tick) => tick > 0);
}

function scale(low, high, from, to, log) {
  const map = log ? Math.log10 : Number;
  const [a, b] = [map(low), map(high)];
  return (value) => from + ((map(value) - a) / (b - a || 1)) * (to - from);
}

/** What all charts are drawn against: a place in "tokens", "step", "hours", and what to call it. A series has its x by each. */
const axis = {key: "tokens", redraw: []};
const AXES = {tokens: ["training tokens", short], step: ["steps", short], hours: ["hours", (value) => String(Number(value.toPrecision(3)))]};

/**
 * A card with a chart against the axis.
 *
 * chart.series: {label, color, by, y, dots, width, opacity, low, high, legend}; null in y breaks the line; low and high are a band
 * chart.lines: {label, value, color}, horizontal;  chart.marks: {label, points, color}, points by tokens and steps;  chart.restarts: {by, color}
 * chart.logX, chart.logY, chart.skipDrop: whether there is a switch, and its first state; chart.zero: y starts at 0
 * skipDrop leaves the values of the first part of training, chart.drop of it, which would press the rest flat, out of the picture
 */
function drawChart(parent, chart) {
  const card = html("div", `card chart${chart.wide ? " wide" : ""}`, null, parent);
  const head = html("div", "chart-head", null, card);
  html("h2", "", chart.title, head);
  const switches = html("div", "", null, head);
  const plot = html("div", "plot", null, card);
  const state = {logX: chart.logX === true, logY: chart.logY === true, skipDrop: chart.skipDrop === true};
  for (const [key, text] of [["skipDrop", "skip the first drop"], ["logX", "log axis"], ["logY", "log scale"]]) {
    if (chart[key] === undefined) continue;
    const label = html("label", "", null, switches);
    const box = html("input", "", null, label);
    box.type = "checkbox";
    box.checked = state[key];
    label.append(` ${text}`);
    box.addEventListener("change", () => { state[key] = box.checked; draw(); });
  }
  drawLegend(card, chart);
  if (chart.note) html("p", "muted", chart.note, card);
  let width = 0;

  function draw() {
    width = plot.clientWidth;
    if (!width) return;
    plot.replaceChildren();
    const key = chart.series.every((s) => s.by[axis.key]) ? axis.key : "tokens";
    const [axisName, axisText] = AXES[key];
    for (const s of [...chart.series, ...(chart.restarts || [])]) s.x = s.by[key];
    const marks = (chart.marks || []).map((m) => ({...m, points: m.points[key] || []}));
    const height = chart.wide ? Math.max(300, Math.min(440, width * 0.46)) : 240;
    const usable = (x, y) => y !== null && isFinite(y) && !(state.logX && x <= 0) && !(state.logY && y <= 0);
    const xs = [], ys = [];
    const see = (x, y) => { if (usable(x, y)) { xs.push(x); ys.push(y); } };
    for (const s of chart.series) s.x.forEach((x, i) => { see(x, s.y[i]); if (s.low) { see(x, s.low[i]); see(x, s.high[i]); } });
    if (!xs.length) { html("p", "muted", chart.empty || "Nothing recorded yet.", plot); return; }
    const extent = (values) => [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
    let [x0, x1] = extent(xs);
    for (const m of marks) for (const [x, y] of m.points) if (x <= x1 * 1.02 && usable(x, y)) { xs.push(x); ys.push(y); }
    for (const l of chart.lines || []) { xs.push(Infinity); ys.push(l.value); }
    if (!state.logX) x0 = Math.min(x0, 0);
    if (x0 === x1) x1 = state.logX ? x0 * 10 : x0 + 1;
    const late = state.skipDrop ? ys.filter((_, i) => xs[i] >= chart.drop * x1) : ys;
    let [y0, y1] = extent(late.length ? late : ys);
    if (state.logY) { y0 /= 1.05; y1 *= 1.05; } else {
      const margin = (y1 - y0 || Math.abs(y1) || 1) * 0.06;
      y0 = chart.zero ? Math.min(0, y0) : y0 - margin;
      y1 += margin;
    }
    const yTicks = state.logY ? logTicks(y0, y1, height / 40) : linearTicks(y0, y1, height / 50);
    const names = yTicks.map((tick) => chart.format(tick, true));
    const left = 12 + 7 * Math.max(...names.map((name) => name.length));
    const box = {left, right: width - 14, top: 12, bottom: height - 40};
    const X = scale(x0, x1, box.left, box.right, state.logX), Y = scale(y0, y1, box.bottom, box.top, state.logY);
    const root = svg("svg", {viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": chart.title}, null, plot);
    yTicks.forEach((tick, i) => {
      svg("line", {class: "grid", x1: box.left, x2: box.right, y1: Y(tick), y2: Y(tick)}, null, root);
      svg("text", {x: box.left - 7, y: Y(tick) + 4, "text-anchor": "end"}, null, root).textContent = names[i];
    });
    const xTicks = state.logX ? logTicks(x0, x1, width / 75) : linearTicks(x0, x1, width / 95);
    for (const tick of xTicks)
      svg("text", {x: X(tick), y: box.bottom + 17, "text-anchor": X(tick) > box.right - 14 ? "end" : "middle"}, null, root).textContent = axisText(tick);
    svg("line", {class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom}, null, root);
    svg("text", {x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle"}, null, root).textContent = axisName;
    const clip = svg("clipPath", {id: `clip${drawChart.count = (drawChart.count || 0) + 1}`}, null, root);
    svg("rect", {x: box.left - 4, y: box.top - 4, width: box.right - box.left + 8, height: box.bottom - box.top + 4}, null, clip);
    const inside = svg("g", {"clip-path": `url(#${clip.id})`}, null, root);
    for (const restart of chart.restarts || [])
      if (restart.x > x0 && restart.x <= x1)
        svg("line", {class: "restart", x1: X(restart.x), x2: X(restart.x), y1: box.top, y2: box.bottom}, restart.color, root);
    for (const s of chart.series) drawSeries(inside, s, X, Y, usable);
    for (const m of marks) for (const [x, y] of m.points) if (x <= x1 * 1.02 && x >= x0 && usable(x, y))
      svg("path", {d: `M${X(x)} ${Y(y) - 5}l5 5l-5 5l-5 -5z`, fill: "none", "stroke-width": 1.6}, m.color, inside);
    const points = chart.series.flatMap((s) => s.x.flatMap((x, i) => (usable(x, s.y[i]) ? [[X(x), Y(s.y[i])]] : [])));
    let lastLabel = Infinity;  // labels of close lines are pushed up, one above the other
    for (const l of [...(chart.lines || [])].sort((a, b) => a.value - b.value)) {
      svg("line", {class: "reference", x1: box.left, x2: box.right, y1: Y(l.value), y2: Y(l.value)}, l.color, root);
      lastLabel = Math.min(Y(l.value) - 5, lastLabel - 14);
      const text = `${l.label} ${chart.format(l.value)}`, wide = 7 * text.length;
      // At the end where it covers fewer points.
      const covered = (from) => points.filter(([x, y]) => x > from - 6 && x < from + wide + 6 && y > lastLabel - 16 && y < lastLabel + 8).length;
      const right = covered(box.right - wide) <= covered(box.left + 4);
      svg("text", {class: "value", x: right ? box.right : box.left + 4, y: lastLabel, "text-anchor": right ? "end" : "start"}, null, root).textContent = text;
    }
    addTip(plot, root, chart, box, X, Y, usable, (x) => `${axisText(x)} ${key}`);
  }
  axis.redraw.push(draw);
  new ResizeObserver(() => { if (plot.clientWidth !== width) draw(); }).observe(plot);
  draw();
}

function drawSeries(root, s, X, Y, usable) {
  if (s.low) {
    const seen = s.x.map((x, i) => i).filter((i) => usable(s.x[i], s.low[i]) && usable(s.x[i], s.high[i]));
    const edge = [...seen.map((i) => `${X(s.x[i])} ${Y(s.high[i])}`), ...seen.reverse().map((i) => `${X(s.x[i])} ${Y(s.low[i])}`)];
    if (edge.length) {
      const band = svg("path", {d: `M${edge.join("L")}Z`, opacity: 0.16}, null, root);
      band.style.fill = s.color;
    }
  }
  let path = "", pen = false;
  s.x.forEach((x, i) => {
    if (!usable(x, s.y[i])) { pen = false; return; }
    path += `${pen ? "L" : "M"}${X(x).toFixed(1)} ${Y(s.y[i]).toFixed(1)}`;
    pen = true;
  });
  svg("path", {d: path || "M0 0", fill: "none", "stroke-width": s.width || 2, "stroke-linejoin": "round", opacity: s.opacity || 1}, s.color, root);
  const points = s.x.map((x, i) => i).filter((i) => usable(s.x[i], s.y[i]));
  const room = Number(root.ownerSVGElement.getAttribute("viewBox").split(" ")[2]) / 16;
  if ((s.dots && points.length <= room) || points.length === 1)
    for (const i of points) svg("circle", {cx: X(s.x[i]), cy: Y(s.y[i]), r: 3, stroke: "none"}, null, root).style.fill = s.color;
}

/** The values nearest to the pointer, of every series that has begun and not ended there. */
function addTip(plot, root, chart, box, X, Y, usable, place) {
  const line = svg("line", {class: "axis", y1: box.top, y2: box.bottom, visibility: "hidden"}, null, root);
  const tip = html("div", "tip", null, plot);
  tip.hidden = true;
  const hide = () => { tip.hidden = true; line.setAttribute("visibility", "hidden"); };
  root.addEventListener("pointerleave", hide);
  root.addEventListener("pointermove", (event) => {
    const at = event.clientX - root.getBoundingClientRect().left;
    const rows = [];
    let nearest = null;
    for (const s of chart.series) {
      let best = null;
      s.x.forEach((x, i) => { if (usable(x, s.y[i]) && (best === null || Math.abs(X(x) - at) < Math.abs(X(s.x[best]) - at))) best = i; });
      if (best === null) continue;
      if (nearest === null || Math.abs(X(s.x[best]) - at) < Math.abs(X(nearest) - at)) nearest = s.x[best];
      rows.push([s, best]);
    }
    if (nearest === null) return hide();
    tip.replaceChildren(html("div", "", place(nearest)));
    for (const [s, i] of rows) {
      const away = Math.abs(X(s.x[i]) - at);
      if (away > 40 && (at < X(s.x.find((x, k) => usable(x, s.y[k]))) || at > X(s.x.findLast((x, k) => usable(x, s.y[k]))))) continue;
      const row = html("div", "", null, tip);
      html("span", "dot", null, row).style.background = s.color;
      row.append(` ${s.label} ${chart.format(s.y[i])}${away > 12 ? ` at ${place(s.x[i])}` : ""}`);
    }
    line.setAttribute("x1", X(nearest)); line.setAttribute("x2", X(nearest)); line.setAttribute("visibility", "visible");
    tip.hidden = false;
    const leftHalf = X(nearest) < (box.left + box.right) / 2;
    tip.style.left = leftHalf ? "auto" : `${box.left + 6}px`;
    tip.style.right = leftHalf ? "14px" : "auto";
  });
}

function drawLegend(card, chart) {
  const legend = html("div", "legend", null, card);
  const entry = (label) => {
    const item = html("span", "", null, legend);
    const picture = svg("svg", {viewBox: "0 0 22 10"}, null, item);
    item.append(label);
    return picture;
  };
  for (const s of chart.series)
    if (s.legend !== false) svg("path", {d: "M0 5H22", "stroke-width": s.width || 2, opacity: s.opacity || 1}, s.color, entry(s.label));
  for (const m of chart.marks || []) svg("path", {d: "M11 0l5 5l-5 5l-5 -5z", fill: "none", "stroke-width": 1.6}, m.color, entry(m.label));
  if (chart.wide && (chart.restarts || []).length) svg("path", {class: "restart", d: "M11 -2V12"}, chart.restarts[0].color, entry("restart"));
}
