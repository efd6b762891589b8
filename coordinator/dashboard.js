// Draws overview.json, and asks for it again every two seconds while somebody looks.
"use strict";

const PAUSE = 2000;
const SVG = "http://www.w3.org/2000/svg";
let cohort = null; // the name of the chosen one
let last = null;

// An element: its class, and children that are elements or text. Text is never read as HTML.
function make(tag, attributes, ...children) {
  const drawn = ["svg", "g", "rect", "line", "text", "path", "circle", "title"].includes(tag);
  const element = drawn ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    // The policy of this page forbids style attributes; properties are allowed.
    if (name === "style") for (const [key, set] of Object.entries(value)) element.style.setProperty(key, set);
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null).map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

const place = (id, ...children) => document.getElementById(id).replaceChildren(...children.filter((child) => child !== null));
// Drawings are as wide as their place, so that their text has its size on every screen.
const width = (id) => Math.max(240, document.getElementById(id).clientWidth);
const empty = (text) => make("p", { class: "empty" }, text);

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) { count /= 1024; unit += 1; }
  return `${unit === 0 || count >= 100 ? Math.round(count) : Number(count.toPrecision(3))} ${units[unit]}`;
}

function span(seconds) {
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${(seconds / 3600).toFixed(1)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

const short = (value) => (value === 0 ? "0" : Math.abs(value) >= 1000 || Math.abs(value) < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3))));
const clock = (time) => new Date(1000 * time).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
const moment = (time) => new Date(1000 * time).toLocaleString([], { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" });
const plural = (count, one, many = `${one}s`) => `${count.toLocaleString()} ${count === 1 ? one : many}`;
const ended = (round) => round.closed_at !== null;
// Devices of a round, by what came of them.
const outcome = (round) => [["accepted", round.accepted], ["refused", round.without], ["missing", round.silent]];

// Round marks from 0 to at least `most`.
function scale(most) {
  if (!(most > 0)) return [0, 1];
  const power = 10 ** Math.floor(Math.log10(most / 3));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => most / candidate <= 4);
  return Array.from({ length: Math.ceil(most / step - 1e-9) + 1 }, (_, index) => index * step);
}

// Round marks around values that are far from 0.
function zoomed(values) {
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const step = scale(most > least ? most - least : most / 10)[1];
  const first = Math.floor(least / step);
  return Array.from({ length: Math.max(2, Math.ceil(most / step) - first + 1) }, (_, index) => (first + index) * step);
}

// A frame with marks on the left; `draw(x, y)` gets functions to place things in it.
function chart({ width, height, marks, text, label, draw }) {
  const [left, right, top, bottom] = [44, 6, 8, 22];
  const [least, most] = [marks[0], marks[marks.length - 1]];
  const x = (share) => left + share * (width - left - right);
  const y = (value) => height - bottom - ((value - least) / (most - least)) * (height - top - bottom);
  return make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
    ...marks.map((mark) => make("g", {},
      make("line", { class: mark === least ? "base" : "grid", x1: left, x2: width - right, y1: y(mark), y2: y(mark) }),
      make("text", { x: left - 7, y: y(mark) + 4, "text-anchor": "end" }, text(mark)))),
    ...draw(x, y));
}

// Which of `count` columns get a number below: few enough to be read.
function labelled(index, count, wide) {
  const every = Math.ceil(count / (wide / 34));
  return (count - 1 - index) % every === 0;
}

function columns(all, { width, height, parts, text, label, title }) {
  const rounds = all.slice(-Math.floor(width / 14));
  const marks = scale(Math.max(...rounds.map((round) => parts(round).reduce((sum, [, value]) => sum + value, 0))));
  return chart({ width, height, marks, text, label, draw: (x, y) => rounds.map((round, index) => {
    const slots = Math.max(rounds.length, 8);
    const [begin, end] = [x(index / slots), x((index + 1) / slots)];
    const wide = Math.min(28, 0.72 * (end - begin));
    const middle = (begin + end) / 2;
    let below = 0;
    const rects = parts(round).filter(([, value]) => value > 0).map(([kind, value]) => {
      const rect = make("rect", { class: kind, x: middle - wide / 2, width: wide, y: y(below + value), height: Math.max(1, y(below) - y(below + value) - (below ? 1 : 0)), rx: 1.5 });
      below += value;
      return rect;
    });
    return make("g", { class: "column" },
      make("title", {}, title(round)),
      make("rect", { class: "hit", x: begin, width: end - begin, y: 8, height: height - 30 }),
      ...rects,
      labelled(index, rounds.length, width - 50) ? make("text", { x: middle, y: height - 6, "text-anchor": "middle" }, round.round) : null);
  }) });
}

// Points are [x share, value, title, mark below or null].
function curve(points, kind, x, y, dots) {
  const path = points.map(([share, value], index) => `${index ? "L" : "M"}${x(share).toFixed(1)} ${y(value).toFixed(1)}`).join("");
  return [make("path", { class: `curve ${kind}`, d: path }),
    ...(dots ? points : points.slice(-1)).map(([share, value, title]) =>
      make("circle", { class: `dot ${kind}`, cx: x(share), cy: y(value), r: 4 }, make("title", {}, title)))];
}

function series(rows, { width, label, title, text = short, marks }) {
  const share = (index) => (rows.length === 1 ? 0.5 : 0.04 + 0.92 * index / (rows.length - 1));
  return chart({ width, height: 170, marks, text, label, draw: (x, y) => [
    ...curve(rows.map(([round, value], index) => [share(index), value, title(round, value)]), "", x, y, rows.length <= 30),
    ...rows.map(([round], index) => (labelled(index, rows.length, width - 50) ? make("text", { x: x(share(index)), y: 164, "text-anchor": "middle" }, round) : null)).filter(Boolean)] });
}

const legend = (...entries) => make("ul", { class: "legend" }, ...entries.map(([color, text]) => make("li", { style: { "--swatch": `var(${color})` } }, text)));

function drawNow(group, now) {
  const round = group.rounds[group.rounds.length - 1];
  if (round.status === "waiting" && round.done >= group.rounds_wanted) {
    place("now", make("div", { class: "line" }, make("strong", {}, "All rounds are over"), make("span", { class: "rest" }, `${round.done} of ${group.rounds_wanted} aggregated`)));
    return;
  }
  if (round.status === "waiting" && group.budget_spent) {
    place("now", make("div", { class: "line" }, make("strong", {}, "All rounds are over"), make("span", { class: "rest" }, `the privacy budget is spent; ${round.done} of ${group.rounds_wanted} aggregated`)));
    return;
  }
  const state = round.paused ? "paused" : round.status;
  const rest = [];
  if (round.status === "open") {
    rest.push(`open for ${span(Math.max(0, now - round.opened_at))}`);
    if (round.deadline !== null && !round.paused) rest.push(round.deadline > now ? `at most ${span(round.deadline - now)} more` : "closing");
  } else {
    rest.push(`begins with ${plural(group.min_devices, "device")} or more`);
  }
  place("now",
    make("div", { class: "line" },
      make("strong", {}, `Round ${round.round}`), make("span", { class: `status ${state}` }, state),
      make("span", { class: "rest" }, rest.join(", "))),
    make("div", { class: "bar", role: "img", "aria-label": `${round.accepted} of ${round.participants} devices have reported` },
      ...[...outcome(round)].filter(([, count]) => count).map(([kind, count]) => make("i", { class: kind, style: { "flex-grow": String(count) } }))),
    legend(["--accepted", `${plural(round.accepted, "update")} accepted`], ["--refused", `${round.without} refused`], ["--missing", `${round.silent} awaited`]));
}

function tile(name, value, detail) {
  return make("dl", { class: "tile" }, make("dt", {}, name), make("dd", {}, value, make("small", { title: detail }, detail)));
}

function drawTiles(group, all) {
  const model = group.generalists.find((generalist) => generalist.current);
  const { done } = group.rounds[group.rounds.length - 1];
  const lost = group.ended.abandoned || 0;
  const connected = all.tiers.reduce((sum, tier) => sum + tier.connected, 0);
  const enrolled = all.tiers.reduce((sum, tier) => sum + tier.enrolled, 0);
  const dropped = group.rounds.filter(ended).reduce((sum, row) => sum + row.silent, 0);
  place("tiles",
    tile("Devices connected", connected.toLocaleString(), `of ${enrolled.toLocaleString()} enrolled`),
    tile("Rounds aggregated", `${done} of ${group.rounds_wanted}`, lost ? `${lost} abandoned` : "none abandoned"),
    tile("Drop-outs", dropped.toLocaleString(), `in ${plural(group.rounds.filter(ended).length, "round")}`),
    tile("Received", bytes(all.traffic.received), `in ${span(all.time - all.started)}`),
    tile("Sent", bytes(all.traffic.sent), `${plural(all.open_calls, "call")} open`),
    model ? tile("Generalist of round", model.number, `${model.bytes === null ? "file missing" : bytes(model.bytes)}, ${model.sha256.slice(0, 12)}`) : null);
}

function drawUpdates(group) {
  const rounds = group.rounds.filter((round) => round.status !== "waiting");
  if (!rounds.length) return place("updates", empty("No round has begun."));
  place("updates",
    columns(rounds, { width: width("updates"), height: 200, text: short, label: "Accepted, refused and missing updates per round",
      parts: outcome,
      title: (round) => `Round ${round.round}, ${round.status}: ${round.accepted} accepted, ${round.without} refused, ${round.silent} without report` }),
    legend(["--accepted", "accepted"], ["--refused", "refused"], ["--missing", "no report"]));
}

function drawSeconds(group) {
  const rounds = group.rounds.filter((round) => round.seconds !== null);
  if (!rounds.length) return place("seconds", empty("No round has begun."));
  place("seconds", columns(rounds, { width: width("seconds"), height: 170, text: short, label: "Seconds per round",
    parts: (round) => [[round.status === "open" ? "missing" : "accepted", round.seconds]],
    title: (round) => `Round ${round.round}: ${span(round.seconds)}${round.status === "open" ? " so far" : ""}` }));
}

function drawSteps(group) {
  const rows = group.generalists.filter((generalist) => generalist.step !== null).map((generalist) => [generalist.number - 1, generalist.step]);
  place("steps", rows.length ? series(rows, { width: width("steps"), marks: scale(Math.max(...rows.map(([, step]) => step))), label: "L2 norm of each round's step", title: (round, value) => `Round ${round}: ${short(value)}` }) : empty("No round was aggregated."),
    rows.length ? legend(["--accepted", "L2 norm, by round"]) : null);
}

function drawQuality(group) {
  const rows = group.rounds.filter((round) => round.perplexity !== null).map((round) => [round.round, round.perplexity, round.status]);
  document.getElementById("quality-card").hidden = !rows.length;
  if (!rows.length) return;
  const kept = rows.filter(([, , status]) => status === "aggregated");
  const gone = rows.filter(([, , status]) => status !== "aggregated");
  place("quality",
    series(kept.length ? kept : rows, { width: width("quality"), marks: zoomed(rows.map(([, value]) => value)), label: "Perplexity after each round", title: (round, value) => `Round ${round}: ${value.toFixed(2)}` }),
    gone.length ? make("p", { class: "empty" }, `Refused as worse: ${gone.map(([round, value]) => `${value.toFixed(2)} in round ${round}`).join(", ")}`) : legend(["--accepted", "on the quality gate's text"]));
}

function drawPrivacy(group) {
  const spent = group.privacy;
  document.getElementById("privacy-card").hidden = !spent;
  if (!spent) return;
  const share = spent.budget === null ? 1 : Math.min(1, spent.epsilon / spent.budget);
  place("privacy", make("div", { class: "tier" },
    make("p", {}, make("span", {}, `\u03b5 ${short(spent.epsilon)} spent`), make("span", {}, spent.budget === null ? "no budget set" : `of ${short(spent.budget)}`)),
    make("div", { class: "bar" }, make("i", { class: share < 0.9 ? "accepted" : "refused", style: { width: `${100 * share}%` } }))),
    empty(`at \u03b4 ${spent.delta}, for one device more or less`));
}

function drawTraffic(traffic) {
  const rates = traffic.samples.slice(1).map(([time, received, sent], index) => {
    const [before, receivedBefore, sentBefore] = traffic.samples[index];
    return [time, (received - receivedBefore) / (time - before), (sent - sentBefore) / (time - before)];
  });
  if (rates.length < 2) return place("traffic", empty("Not yet measured."));
  const [from, to] = [rates[0][0], rates[rates.length - 1][0]];
  // Marks are powers of two, so that they are whole kibibytes.
  const most = Math.max(...rates.map(([, received, sent]) => Math.max(received, sent)), 1);
  const step = 2 ** Math.ceil(Math.log2(most / 4));
  const marks = Array.from({ length: Math.ceil(most / step) + 1 }, (_, index) => index * step);
  const points = (which) => rates.map((row) => [(row[0] - from) / (to - from), row[which], `${bytes(row[which])}/s at ${clock(row[0])}`]);
  place("traffic",
    chart({ width: width("traffic"), height: 170, marks, text: (value) => (value ? bytes(value) : "0"), label: "Bytes per second received and sent", draw: (x, y) => [
      ...curve(points(1), "", x, y, false), ...curve(points(2), "second", x, y, false),
      make("text", { x: x(0), y: 164 }, clock(from)), make("text", { x: x(1), y: 164, "text-anchor": "end" }, clock(to))] }),
    legend(["--accepted", "received per second"], ["--second", "sent per second"]));
}

function drawTiers(tiers) {
  const most = Math.max(...tiers.map((tier) => tier.enrolled));
  place("tiers", ...(tiers.length ? tiers.map((tier) => make("div", { class: "tier" },
    make("p", {}, make("span", {}, tier.tier), make("span", {}, `${tier.connected} of ${tier.enrolled}`)),
    make("div", { class: "bar", style: { width: `${Math.max(4, 100 * tier.enrolled / most)}%` } },
      make("i", { class: "accepted", style: { width: `${100 * tier.connected / tier.enrolled}%`, "min-width": "0" } })))) : [empty("No device has enrolled.")]),
    tiers.length ? legend(["--accepted", "connected"], ["--grid", "enrolled"]) : null);
}

function drawRounds(group) {
  const heading = [["Round", "number"], ["Status"], ["Devices", "number"], ["Accepted", "number"], ["Refused", "number"], ["No report", "number"], ["Seconds", "number"], ["Ended"], ["Aggregation, remarks"]];
  // After the last round another one waits that will not be.
  const shown = group.rounds.filter((round) => round.status !== "waiting" || (round.done < group.rounds_wanted && !group.budget_spent));
  const rows = shown.reverse().map((round) => make("tr", {},
    make("td", { class: "number" }, round.round),
    make("td", {}, make("span", { class: round.status }, round.paused ? "paused" : round.status)),
    ...[round.participants, round.accepted, round.refusals, round.silent].map((count) => make("td", { class: "number" }, count)),
    make("td", { class: "number" }, round.seconds === null ? "" : round.seconds.toFixed(1)),
    make("td", {}, round.closed_at === null ? "" : moment(round.closed_at)),
    make("td", { class: "note" }, [round.aggregation, round.clipped ? `steps clipped: ${round.clipped}` : null, round.clipped_coordinates ? `coordinates clipped: ${round.clipped_coordinates}` : null, round.rolled_back_to ? `from the start of round ${round.rolled_back_to}` : null, round.reason].filter(Boolean).join("; "))));
  place("rounds", make("thead", {}, make("tr", {}, ...heading.map(([name, kind]) => make("th", kind ? { class: kind } : {}, name)))), make("tbody", {}, ...rows));
}

function drawCohorts(cohorts) {
  const bar = document.getElementById("cohorts");
  bar.hidden = cohorts.length < 2;
  bar.replaceChildren(...cohorts.map(({ name }) => {
    const button = make("button", { type: "button", "aria-pressed": String(name === cohort) }, name);
    button.addEventListener("click", () => { cohort = name; draw(last); });
    return button;
  }));
}

function draw(all) {
  last = all;
  const group = all.cohorts.find(({ name }) => name === cohort) || all.cohorts[0];
  cohort = group.name;
  drawCohorts(all.cohorts);
  drawNow(group, all.time);
  drawTiles(group, all);
  // These first: whether they are there decides how wide the others are.
  drawQuality(group);
  drawPrivacy(group);
  drawUpdates(group);
  drawSeconds(group);
  drawSteps(group);
  drawTraffic(all.traffic);
  drawTiers(all.tiers);
  drawRounds(group);
  document.body.dataset.drawn = String(all.time);
}

async function refresh() {
  const live = document.getElementById("live");
  try {
    const answer = await fetch("overview.json");
    if (!answer.ok) throw new Error(await answer.text());
    draw(await answer.json());
    live.className = "";
    live.textContent = `live, ${new Date(1000 * last.time).toLocaleTimeString()}`;
  } catch (error) {
    live.className = "lost";
    live.textContent = last ? `no answer since ${new Date(1000 * last.time).toLocaleTimeString()}` : "no answer";
    if (!(error instanceof TypeError)) console.error(error);
  }
}

async function run() {
  for (;;) {
    if (!document.hidden) await refresh();
    await new Promise((resolve) => setTimeout(resolve, PAUSE));
  }
}

window.addEventListener("resize", () => { if (last) draw(last); });
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
run();
