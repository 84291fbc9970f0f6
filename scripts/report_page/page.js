// The page's content, from the values that gpt2/report/content.py gathered.
"use strict";

const report = JSON.parse(document.getElementById("data").textContent);
const runs = report.runs;
const COLORS = 6;
const color = (index) => `var(--run${index % COLORS})`;
const alone = runs.length === 1;
const named = (run, what) => (alone ? what : `${run.name}: ${what}`);
const percent = (value, tick) => (value === null ? "–" : `${Number((value * 100).toFixed(tick ? 1 : 2))} %`);
const scientific = (value) => (value === null ? "–" : value === 0 ? "0" : value.toExponential(2).replace(/\.?0+e/, "e"));
const when = (seconds) => new Date(seconds * 1000).toISOString().replace("T", " ").slice(0, 16) + " UTC";
const shown = (value) => (value === null || value === undefined ? "–" : typeof value === "object" ? JSON.stringify(value) : String(value));

function duration(seconds) {
  if (seconds < 60) return `${Number(seconds.toPrecision(2))} s`;
  if (seconds < 3600) return `${(seconds / 60).toFixed(1)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

function heading() {
  document.title = document.getElementById("title").textContent = alone ? runs[0].name : runs.map((run) => run.name).join(" · ");
  document.getElementById("made").textContent = `GPT-2 training report, as of ${when(report.time)}`;
}

function summary(parent) {
  if (report.mixed)
    html("p", "note", "These runs read different data sets: their losses cannot be compared with each other, only each with the baseline of its own data set.", parent);
  runs.forEach((run, index) => {
    const card = html("div", "card", null, parent);
    const head = html("div", "run-head", null, card);
    html("span", "dot", null, head).style.background = color(index);
    html("h2", "", run.name, head);
    html("span", `status ${run.status}`, run.status, head);
    html("span", "muted", [run.size && `GPT-2 ${run.size}`, run.corpus || run.dataset].filter(Boolean).join(" · "), head);
    const tiles = html("dl", "tiles", null, card);
    const tile = (name, value, small) => {
      const box = html("div", "", null, tiles);
      html("dt", "", name, box);
      const text = html("dd", "", value, box);
      if (small) html("small", "", small, text);
    };
    tile("tokens", short(run.tokens), run.total_steps ? `step ${run.step.toLocaleString("en")} of ${run.total_steps.toLocaleString("en")}` : `step ${run.step}`);
    const gap = run.baseline === null || run.best_loss === null ? null : run.baseline - run.best_loss;
    const bits = run.best_bits_per_byte === null ? "" : `, ${run.best_bits_per_byte.toFixed(4)} bits per byte`;
    tile("best validation loss", run.best_loss === null ? "–" : run.best_loss.toFixed(4),
      run.best_loss === null ? "no evaluation yet" :
      gap === null ? `perplexity ${short(Math.exp(run.best_loss))}${bits}` : `GPT-2: ${run.baseline.toFixed(4)}, ${Math.abs(gap).toFixed(4)} ${gap >= 0 ? "better" : "to go"}${bits}`);
    const last = run.hellaswag.acc_norm.length - 1;
    if (last >= 0)
      tile("HellaSwag", percent(run.hellaswag.acc_norm[last]), `${percent(run.hellaswag.low[last])} to ${percent(run.hellaswag.high[last])}, ${run.hellaswag.examples.at(-1).toLocaleString("en")} examples`);
    tile("tokens a second", run.tokens_per_second === null ? "–" : Math.round(run.tokens_per_second).toLocaleString("en"), run.mfu === null ? "median, training only" : `MFU ${percent(run.mfu)}`);
    const wall = Object.values(run.seconds).reduce((a, b) => a + b, 0);
    if (run.seconds_left !== null) tile("time left", duration(run.seconds_left), "at the pace of the last steps");
    tile("time", duration(wall), run.environment.world_size > 1 ? `${Number(run.device_hours.toPrecision(3))} device-hours` : run.environment.device || "");
    if (run.cost !== null)
      tile("cost", run.cost >= 100 ? run.cost.toFixed(0) : run.cost.toFixed(2), `${Number(run.device_hours.toPrecision(3))} device-hours × ${report.price}`);
  });
}

/** Mean of a fiftieth of the points around each, fewer near the ends, so that the curve does not lag. */
function smooth(values) {
  const reach = Math.floor(values.length / 100);
  return values.map((value, i) => {
    const side = Math.min(reach, i, values.length - 1 - i);
    const near = values.slice(i - side, i + side + 1).filter((other) => other !== null);
    return value === null ? null : near.reduce((a, b) => a + b, 0) / near.length;
  });
}

function charts(parent) {
  // A line or mark for one run alone takes its colour where there are several; shared ones stay grey.
  const tint = (entry) => (alone || entry.runs.length > 1 ? "var(--muted)" : color(entry.runs[0]));
  const tinted = (entries) => entries.map((entry) => ({...entry, color: tint(entry)}));
  const perToken = (run) => run.tokens / Math.max(run.step, 1);
  const restarts = runs.flatMap((run, index) => run.starts.filter((start) => start.step > 0).map((start) => ({by: {...start, tokens: start.step * perToken(run)}, color: color(index)})));
  chooseAxis(parent);
  const thinned = runs.some((run) => run.train.step.length >= 1500);
  const over = [...new Set(runs.flatMap((run) => run.val.val_tokens))];
  const loss = runs.flatMap((run, index) => [
    {label: named(run, "train"), color: color(index), by: run.train, y: run.train.loss, width: 1, opacity: 0.35, legend: false},
    {label: named(run, "train, smoothed"), color: color(index), by: run.train, y: smooth(run.train.loss), width: 1.4, opacity: 0.7},
    {label: named(run, "validation"), color: color(index), by: run.val, y: run.val.loss, width: 2.4, dots: true},
  ]).filter((series) => series.y.length);
  drawChart(parent, {
    title: "Loss", wide: true, skipDrop: report.long, drop: report.drop, logX: false, logY: false,
    format: (value, tick) => (value === null ? "–" : tick ? String(Number(value.toPrecision(4))) : value.toFixed(4)),
    series: loss, lines: tinted(report.baselines), marks: tinted(report.milestones.filter((entry) => entry.points.tokens.some(([tokens]) => entry.runs.some((index) => tokens <= runs[index].tokens * 1.02)))), restarts,
    note: [
      "Nats a token.",
      over.length ? `Validation over ${over.map((count) => count.toLocaleString("en")).join(" or ")} tokens.` : "No evaluation yet.",
      report.baselines.length && over.some((count) => count !== 10485760) ? "GPT-2's figure is a mean over 10,485,760." : "",
      thinned ? "Long training curves are drawn as means of equal parts." : "",
    ].filter(Boolean).join(" "),
  });
  if (report.groups.length)
    drawChart(parent, {
      title: "Validation loss, mean over seeds", wide: true, skipDrop: report.long, drop: report.drop, logX: false, logY: false,
      format: (value, tick) => (value === null ? "–" : tick ? String(Number(value.toPrecision(4))) : value.toFixed(4)),
      series: report.groups.map((group, index) => ({
        label: `${group.name} (${group.n})`, color: color(index), dots: true, width: 2.4, by: {tokens: group.tokens}, y: group.loss,
        low: group.loss.map((value, i) => value === null ? null : value - group.stderr[i]), high: group.loss.map((value, i) => value === null ? null : value + group.stderr[i]),
      })),
      note: "Runs that differ in nothing but the seed, how many in brackets. Band: one standard error. scripts/compare.py tells which differences are more than chance.",
    });
  if (runs.some((run) => run.hellaswag.step.length))
    drawChart(parent, {
      title: "HellaSwag", wide: true, logX: false, format: percent,
      series: runs.map((run, index) => ({
        label: named(run, `acc_norm (${run.hellaswag.convention.join(", ")})`), color: color(index), dots: true, width: 2.4, by: run.hellaswag, y: run.hellaswag.acc_norm,
        low: run.hellaswag.low, high: run.hellaswag.high,
      })).filter((series) => series.y.length),
      lines: tinted(report.hellaswag_lines), restarts,
      note: `Band: 95 % interval (Wilson). Examples: ${[...new Set(runs.flatMap((run) => run.hellaswag.examples))].map((count) => count.toLocaleString("en")).join(" or ")} of 10,042.`,
    });
  const small = (title, field, options) => drawChart(parent, {
    title, logX: false, restarts, ...options,
    series: runs.map((run, index) => ({label: named(run, title.toLowerCase()), color: color(index), width: 1.6, legend: !alone, by: run.train, y: run.train[field]})).filter((series) => series.y.some((value) => value !== null)),
  });
  small("Learning rate", "lr", {format: scientific, zero: true});
  small("Gradient norm", "grad_norm", {format: (value) => short(value), logY: false, zero: true, note: thinned ? "The largest of each part." : ""});
  small("Tokens a second", "tokens_per_second", {format: (value) => short(value), zero: true, note: "Training alone; the first point of a start has compilation in it."});
  if (runs.some((run) => run.train.mfu.some((value) => value !== null))) small("Model FLOP/s utilisation", "mfu", {format: percent, zero: true});
  timeSplit(parent);
}

/** A choice of what the charts are drawn against. */
function chooseAxis(parent) {
  const bar = html("div", "axes wide", null, parent);
  bar.setAttribute("role", "group");
  bar.setAttribute("aria-label", "Horizontal axis");
  html("span", "muted", "against", bar);
  for (const key of Object.keys(AXES)) {
    const button = html("button", "", AXES[key][0], bar);
    button.setAttribute("aria-pressed", String(key === axis.key));
    button.addEventListener("click", () => {
      axis.key = key;
      for (const other of bar.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button));
      for (const draw of axis.redraw) draw();
    });
  }
}

function timeSplit(parent) {
  const card = html("div", "card", null, parent);
  const narrow = [...parent.querySelectorAll(".chart:not(.wide)")].length;
  if (narrow % 2 === 0) card.classList.add("wide");
  html("h2", "", "Where the time went", card);
  const phases = [["train", "training", "var(--run0)"], ["data", "waiting for data", "var(--run4)"], ["eval", "evaluation", "var(--run2)"], ["save", "saving, reporting", "var(--run3)"]];
  for (const run of runs) {
    const total = phases.reduce((sum, [key]) => sum + (run.seconds[key] || 0), 0);
    if (!alone) html("h3", "", run.name, card);
    if (!total) { html("p", "muted", "Nothing recorded yet.", card); continue; }
    const bar = html("div", "split", null, card);
    const legend = html("div", "legend", null, card);
    for (const [key, title, tone] of phases) {
      const part = (run.seconds[key] || 0) / total;
      const piece = html("span", "", null, bar);
      piece.style.cssText = `width:${part * 100}%;background:${tone}`;
      const item = html("span", "", null, legend);
      html("span", "dot", null, item).style.background = tone;
      item.append(` ${title} ${percent(part, true)}, ${duration(run.seconds[key] || 0)}`);
    }
  }
  html("p", "muted", "All starts together, with the steps that a restart repeated.", card);
}

function quote(parent, sample) {
  const block = html("blockquote", "", null, parent);
  html("span", "", sample.prompt, block);
  block.append(sample.text);
}

function samples(parent) {
  if (!runs.some((run) => run.samples.length)) return;
  const card = html("div", "card", null, parent);
  html("h2", "", "Samples", card);
  for (const run of runs) {
    if (!run.samples.length) continue;
    if (!alone) html("h3", "", run.name, card);
    const steps = [...new Set(run.samples.map((sample) => sample.step))];
    const count = Math.min(steps.length, 4);
    const few = [...new Set(Array.from({length: count}, (_, i) => steps[Math.round((i * (steps.length - 1)) / Math.max(count - 1, 1))]))];
    const at = (step) => {
      const index = run.val.step.indexOf(step);
      const tokens = run.samples.find((sample) => sample.step === step).tokens;
      return `step ${step.toLocaleString("en")} · ${short(tokens)} tokens${index < 0 || run.val.loss[index] === null ? "" : ` · loss ${run.val.loss[index].toFixed(3)}${run.val.bits_per_byte[index] === null ? "" : ` (${run.val.bits_per_byte[index].toFixed(3)} bits per byte)`}`}`;
    };
    const grid = html("div", "samples", null, card);
    for (const step of few) {
      const box = html("div", "", null, grid);
      html("div", "muted", at(step), box);
      const ofStep = run.samples.filter((sample) => sample.step === step);
      const prompts = [...new Set(ofStep.map((sample) => sample.prompt))].slice(0, 2);
      for (const prompt of prompts) quote(box, ofStep.find((sample) => sample.prompt === prompt));
    }
    const more = html("details", "", null, card);
    html("summary", "muted", `all ${run.samples.length} samples`, more);
    const list = html("div", "tall", null, more);
    for (const step of steps) {
      html("div", "muted", at(step), list);
      for (const sample of run.samples) if (sample.step === step) quote(list, sample);
    }
  }
}

function table(parent, head, rows) {
  const box = html("div", "scroll", null, parent);
  box.tabIndex = 0;  // arrow keys scroll it
  const body = html("table", "", null, box);
  const top = html("tr", "", null, body);
  for (const text of head) html("th", "", text, top);
  for (const row of rows) {
    const line = html("tr", "", null, body);
    for (const cell of row) html("td", "", shown(cell), line);
  }
}

function events(parent) {
  const card = html("div", "card", null, parent);
  html("h2", "", "Restarts and skipped steps", card);
  for (const run of runs) {
    if (!alone) html("h3", "", run.name, card);
    const changed = (start) => Object.entries(start.changed).map(([name, [old, now]]) => `${name} ${shown(old)} → ${shown(now)}`).join(", ") || "–";
    table(card, ["start", "from step", "processes", "changed settings"], run.starts.map((start) => [when(start.time), start.step, start.world_size, changed(start)]));
    const said = [];
    if (run.repeated) said.push(`${run.repeated} logged ${run.repeated === 1 ? "step" : "steps"} past a checkpoint came to nothing, and are left out.`);
    if (run.torn) said.push(`${run.torn} unreadable ${run.torn === 1 ? "line was" : "lines were"} left out.`);
    said.push(run.skips.length ? `${run.skips.length} ${run.skips.length === 1 ? "update was" : "updates were"} skipped:` : "No update was skipped.");
    html("p", "muted", said.join(" "), card);
    if (run.skips.length) table(card, ["step", "reason", "loss", "gradient norm"], run.skips.map((skip) => [skip.step, skip.reason, skip.loss ?? "not finite", skip.grad_norm ?? "not finite"]));
  }
}

function settings(parent) {
  const card = html("div", "card", null, parent);
  html("h2", "", "Configuration and environment", card);
  const names = runs.map((run) => run.name);
  if (!alone) {
    html("h3", "", "Differences", card);
    if (report.differences.length) table(card, ["setting", ...names], report.differences.map((row) => [row.name, ...row.values]));
    else html("p", "muted", "None.", card);
  }
  const rows = (of) => {
    const keys = [...new Set(runs.flatMap((run) => Object.keys(of(run))))];
    return keys.map((key) => [key, ...runs.map((run) => of(run)[key])]);
  };
  html("h3", "", "Environment", card);
  table(card, ["", ...names], rows((run) => {
    const {versions, commit, ...rest} = run.environment;
    return {...rest, commit: commit && commit.replace(/^(.{12})[0-9a-f]*/, "$1"), ...versions};
  }));
  const all = html("details", "", null, card);
  html("summary", "muted", "all settings", all);
  const flat = (run) => Object.fromEntries(Object.entries(run.config).flatMap(([part, values]) => Object.entries(values).map(([name, value]) => [`${part}.${name}`, value])));
  table(all, ["setting", ...names], rows(flat));
}

heading();
summary(document.getElementById("summary"));
charts(document.getElementById("charts"));
samples(document.getElementById("details"));
events(document.getElementById("details"));
settings(document.getElementById("details"));
document.body.dataset.ready = "yes";
