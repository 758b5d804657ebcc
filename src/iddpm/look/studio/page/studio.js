"use strict";
// The studio's page: it asks the server for what it shows, and keeps nothing but what was chosen.
(() => {
  const $ = id => document.getElementById(id);
  const make = (tag, props = {}, ...inside) => {
    const made = Object.assign(document.createElement(tag), props);
    made.append(...inside);
    return made;
  };
  const figure = v => v == null ? "–" : +v.toPrecision(4) + "";
  const ago = seconds => seconds < 90 ? "just now" : seconds < 5400 ? Math.round(seconds / 60) + " min ago" : seconds < 172800 ? Math.round(seconds / 3600) + " h ago" : Math.round(seconds / 86400) + " days ago";

  // An answer of the server; what it refuses is an Error with its sentence.
  async function ask(path, body, signal) {
    const how = body === undefined ? { signal } : { method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" }, signal };
    const answer = await fetch("/api/" + path, how);
    if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).error || `the studio answered ${answer.status}`);
    return answer;
  }
  const json = async (...asked) => (await ask(...asked)).json();

  function told(box, error) {
    box.hidden = !error;
    box.textContent = error ? error.message || error : "";
  }

  // Ask again and again, the next time later the longer an answer takes, so that a page costs the machine 2 % at most.
  function repeat(work, least) {
    let timer, busy = false;
    async function go() {
      clearTimeout(timer);
      if (busy) return;
      busy = true;
      const began = performance.now();
      try { if (!document.hidden) await work(); $("link").textContent = ""; }
      catch (e) { $("link").textContent = e instanceof TypeError ? "the studio does not answer" : e.message; }
      busy = false;
      timer = setTimeout(go, Math.max(least, 50 * (performance.now() - began)));
    }
    document.addEventListener("visibilitychange", () => { if (!document.hidden) go(); });
    go();
    return go;
  }

  // ---- tabs

  const tabs = [...document.querySelectorAll("[role=tab]")];
  function open(name) {
    for (const tab of tabs) {
      const is = tab.getAttribute("aria-controls") === name;
      tab.setAttribute("aria-selected", is);
      tab.tabIndex = is ? 0 : -1;
      $(tab.getAttribute("aria-controls")).hidden = !is;
    }
    if (name === "play") models();
    if (name === "train") form();
  }
  tabs.forEach((tab, k) => {
    tab.onclick = () => { location.hash = tab.getAttribute("aria-controls"); };
    tab.onkeydown = e => {
      const to = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
      if (to) { const next = tabs[(k + to + tabs.length) % tabs.length]; next.focus(); next.click(); }
    };
  });
  const opened = () => open({ "#play": "play", "#train": "train" }[location.hash] || "runs");
  addEventListener("hashchange", opened);

  // ---- runs: the list, and the report of what is chosen, whose curves go on

  let runs = [], trainings = [], chosen = [], mark = "", shown = null, viewing = 0;

  async function list() {
    const found = await json("listing");
    runs = found.runs;
    trainings = found.trainings;
    rows();
    training();
    if (!chosen.length && runs.some(r => !r.fault)) choose([runs.find(r => !r.fault).name]);
  }

  function rows() {
    const now = Date.now() / 1000, held = document.activeElement?.dataset?.key;
    $("rows").replaceChildren(...runs.map(r => {
      const row = make("tr");
      row.setAttribute("aria-current", chosen.includes(r.name));
      const box = make("input", { type: "checkbox", checked: chosen.includes(r.name), disabled: !!r.fault, onchange: e => choose(e.target.checked ? [...chosen, r.name] : chosen.filter(n => n !== r.name)) });
      box.setAttribute("aria-label", "compare " + r.name);
      box.dataset.key = "box " + r.name;
      const name = make("button", { className: "name", textContent: r.name, title: r.what || "", disabled: !!r.fault, onclick: () => choose([r.name]) });
      name.dataset.key = "name " + r.name;
      row.append(make("td", {}, box), make("th", { scope: "row" }, name));
      if (r.fault) row.append(make("td", { className: "fault", colSpan: 5, textContent: r.fault }));
      else {
        const share = r.share == null ? "" : make("progress", { value: r.share, max: 1 });
        if (share) share.setAttribute("aria-label", "progress of " + r.name);
        row.append(make("td", {}, share, r.progress), make("td", { textContent: figure(r.loss) }), make("td", { textContent: figure(r.pace) }), make("td", { textContent: ago(now - r.changed) }));
        const t = trainings.find(t => t.name === r.name && t.state === "running");
        row.append(make("td", {}, t ? "training" : !r.draws ? "" : make("button", { textContent: "play", onclick: () => { wish.model.value = r.name; location.hash = "play"; load(r.name); } })));
      }
      return row;
    }));
    if (!runs.length) $("rows").append(make("tr", {}, make("td", { colSpan: 7, textContent: "There is no run here yet: start one in the tab Train, or with iddpm train." })));
    if (held) document.querySelector(`[data-key="${CSS.escape(held)}"]`)?.focus();
  }

  const query = () => chosen.map(name => "run=" + encodeURIComponent(name)).join("&");

  async function choose(names) {
    chosen = names;
    mark = "";
    rows();
    await show();
  }

  function leave() {
    shown?.close();
    shown = null;
    $("view").replaceChildren();
  }

  async function show() {
    if (!chosen.length) { leave(); return; }
    const mine = ++viewing, slider = $("view").querySelector(".slide input");
    const kept = slider && slider.value !== slider.max ? slider.value : null, scrolled = scrollY, folded = [...$("view").querySelectorAll("details")].map(d => d.open);
    try {
      const found = await json("view?" + query());
      if (mine !== viewing) return;
      const again = mark !== "";
      mark = found.mark;
      leave();
      $("view").innerHTML = found.html;
      shown = report($("view"), found.data);
      if (again) {  // of the same runs: it stays as it was looked at
        const now = $("view").querySelector(".slide input");
        if (kept !== null && now) { now.value = kept; now.oninput(); }
        $("view").querySelectorAll("details").forEach((d, k) => { d.open = folded[k] ?? d.open; });
        scrollTo(0, scrolled);
      }
    } catch (e) {
      if (mine === viewing) { leave(); $("view").append(make("p", { className: "warning", role: "alert", textContent: e.message })); mark = ""; }
    }
  }

  async function follow() {
    if (!chosen.length || !shown || $("runs").hidden) return;
    const found = await json("curves?" + query());
    if (found.mark !== mark) await show(); else shown.update(found.runs);
  }

  // ---- the playground

  const wish = $("wish").elements;
  let model = null, kind = "draw", picture = "", stopping = null;
  const KINDS = { draw: "from noise", edit: "edit a picture", between: "between two seeds", given: "from a picture" };

  function options(select, rows, value) {
    select.replaceChildren(...rows.map(([v, text]) => make("option", { value: v, textContent: text })));
    if (value != null && rows.some(([v]) => String(v) === String(value))) select.value = value;
  }

  async function models() {
    if (!runs.length) await list().catch(() => {});
    const able = runs.filter(r => r.draws).map(r => [r.name, r.name]), now = wish.model.value || chosen.find(n => able.some(([a]) => a === n));
    options(wish.model, able, now);
    if (!able.length) told($("fault"), "no run here has a checkpoint yet");
    if (wish.model.value && (!model || model.name !== wish.model.value)) await load(wish.model.value);
  }

  let loads = 0;
  async function load(name) {
    const mine = ++loads, others = [...wish].filter(e => e !== wish.model && e.id !== "cancel");
    others.forEach(e => { e.disabled = true; });  // what it sets is not to undo what is typed meanwhile
    let found = null, fault = "";
    try { found = await json("model?run=" + encodeURIComponent(name)); } catch (e) { fault = e; }
    if (mine !== loads) return;  // another was chosen meanwhile
    others.forEach(e => { e.disabled = false; });
    told($("fault"), fault);
    model = found;
    if (!model) return;
    const m = model, enlarges = m.task === "enlarge";
    if (wish.model.value !== name) options(wish.model, runs.filter(r => r.draws).map(r => [r.name, r.name]), name);
    $("about").textContent = `${m.size[0]} × ${m.size[1]} pixels, step ${m.step.toLocaleString("en")}` + (m.given ? `; it is given pictures of ${m.given[1]} × ${m.given[2]}` : "") + (enlarges ? ", which it enlarges" : "");
    options(wish.step, [[-1, "newest"], ...m.steps.reverse().map(s => [s, "step " + s.toLocaleString("en")])], -1);
    options(wish.ema_rate, [[-1, m.rates.length ? "averaged" : "raw"], ...m.rates.slice(1).map(r => [r, "averaged " + r]), ...(m.rates.length ? [[0, "raw"]] : [])], -1);
    options(wish.solver, Object.keys(m.solvers).map(s => [s, s]), m.defaults.solver);
    options(wish.labels, [["", "all"], ...m.classes.map(c => [/[,"]/.test(c) ? `"${c.replaceAll('"', '""')}"` : c, c])], "");
    wish.sampling_steps.value = m.defaults.solver === "ancestral" ? m.defaults.sampling_steps : Math.min(25, parseInt(m.defaults.sampling_steps) || 25);
    wish.guidance.value = m.defaults.guidance;
    $("kinds").replaceChildren(...m.kinds.map(k => {
      const button = make("button", { type: "button", textContent: KINDS[k], onclick: () => act(k) });
      button.dataset.act = k;
      return button;
    }));
    picture = "";
    $("board").hidden = true;
    $("fitted").textContent = "";
    wish.file.value = "";
    act(m.kinds.includes(kind) ? kind : m.kinds[0]);
    outputs();
  }

  function act(to) {
    if (kind !== to) wish.seeds.value = { draw: "0-7", edit: "0-3", between: "0,1", given: "0-3" }[to];
    kind = to;
    document.querySelectorAll("[data-act]").forEach(b => b.setAttribute("aria-pressed", b.dataset.act === kind));
    document.querySelectorAll("#wish [data-kind]").forEach(part => { (part.closest("label.row") || part).hidden = !part.dataset.kind.split(" ").includes(kind); });
    document.querySelector("[data-labels]").hidden = !model.class_cond || !model.classes.length;
    document.querySelector("[data-guidance]").hidden = !model.guidance;
    $("mask").hidden = kind !== "edit";
    if (kind !== "draw" && model.class_cond && !wish.labels.value && model.classes.length) wish.labels.selectedIndex = 1;
  }

  function outputs() {
    for (const input of $("wish").querySelectorAll("input[type=range]")) { const out = input.parentElement.querySelector("output"); if (out) out.textContent = input.value; }
    $("solver-help").textContent = model ? model.solvers[wish.solver.value] || "" : "";
  }
  $("wish").addEventListener("input", outputs);
  wish.model.onchange = () => load(wish.model.value);

  const read = file => new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(new Error("the file cannot be read"));
    reader.readAsDataURL(file);
  });

  wish.file.onchange = async () => {
    picture = "";
    $("board").hidden = true;
    $("fitted").textContent = "";
    told($("fault"), "");
    const file = wish.file.files[0];
    if (!file) return;
    try {
      if (file.size > 16 << 20) throw new Error("more than 16 MB: take a smaller picture");
      const sent = await read(file), found = await json("picture", { model: model.name, image: sent });
      picture = sent;
      $("given").src = found.image;
      $("fitted").textContent = found.note;
      $("board").hidden = false;
      const [h, w] = model.given ? model.given.slice(1) : model.size, times = Math.max(1, Math.round(256 / Math.max(h, w)));
      mask.size(w * times, h * times);
    } catch (e) { told($("fault"), e); }
  };

  const mask = board($("mask"), wish.brush);
  $("wipe").onclick = mask.wipe;

  // One drawing: asks for it, and shows what comes, line by line.
  async function draw(asked, title, signal, group) {
    const bar = make("progress", { max: 1, value: 0 }), note = make("small", { textContent: "waiting" }), body = make("div", { className: "sides" });
    bar.setAttribute("aria-label", "progress of the drawing");
    const box = make("figure", { className: "drawing" }, make("figcaption", {}, title, note), bar, body);
    group.append(box);
    const pictures = ["what the solver stands at (x)", "what the network takes it for (x0)"].map(text => { const img = make("img", { alt: text }); body.append(make("figure", {}, img, make("figcaption", { textContent: text }))); return img; });
    try {
      const answer = await ask("draw", asked, signal), reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "", ended = false;
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        const lines = (rest + value).split("\n");
        rest = lines.pop();
        for (const line of lines) ended = event(JSON.parse(line)) || ended;
      }
      if (!ended) throw new Error("the studio ended before the picture was drawn");
    } catch (e) {
      bar.remove();
      note.textContent = e.name === "AbortError" ? "cancelled" : "";
      if (e.name !== "AbortError") { if (!pictures[0].src) body.replaceChildren(); told($("fault"), e); note.textContent = "failed"; }
    }

    function event(found) {
      if (found.error) throw new Error(found.error);
      if (found.waiting) note.textContent = "others are drawing too: in turn";
      if (found.of) { bar.value = found.done / found.of; note.textContent = `step ${found.done} of ${found.of}`; }
      if (found.x) [pictures[0].src, pictures[1].src] = [found.x, found.x0];
      if (!found.images) return false;
      bar.remove();
      note.textContent = `${found.steps} steps, ${found.seconds.toFixed(1)} s`;
      const seeds = asked.kind === "between" ? [] : spread(asked.seeds);
      const cells = found.images.map((src, k) => make("figure", {}, make("img", { src, alt: seeds[k] == null ? `picture ${k + 1}` : `image of seed ${seeds[k]}` }), make("figcaption", { textContent: seeds[k] == null ? "" : "seed " + seeds[k] })));
      box.append(make("div", { className: "cells" + (asked.kind === "between" ? " strip" : "") }, ...cells));
      body.remove();
      box.querySelector("figcaption").append(make("a", { href: found.sheet, download: `${asked.model}-${asked.kind}.png`.replace("/", "-"), textContent: "save" }));
      return true;
    }
  }

  const spread = seeds => seeds.split(",").flatMap(part => { const [a, b] = part.split("-").map(Number); return b == null ? [a] : Array.from({ length: Math.max(0, b - a + 1) }, (_, k) => a + k); });

  $("wish").onsubmit = async e => {
    e.preventDefault();
    if (!model || stopping) return;
    told($("fault"), "");
    const asked = { kind, model: model.name, step: +wish.step.value, ema_rate: +wish.ema_rate.value, seeds: wish.seeds.value, solver: wish.solver.value, sampling_steps: wish.sampling_steps.value };
    if (model.class_cond && wish.labels.value) asked.labels = wish.labels.value;
    if (model.guidance) asked.guidance = +wish.guidance.value;
    if (kind === "edit" || kind === "given") {
      if (!picture) { told($("fault"), "upload a picture first"); return; }
      asked.image = picture;
    }
    if (kind === "edit") { asked.strength = +wish.strength.value; const painted = mask.image(); if (painted) asked.mask = painted; }
    if (kind === "between") asked.frames = +wish.frames.value;
    stopping = new AbortController();
    $("cancel").disabled = false;
    $("wish").querySelector(".main").disabled = true;
    const beside = kind === "draw" && wish.beside.checked;
    const solvers = beside ? [asked.solver, ...["ddim", "heun", "dpmpp_2m", "unipc", "ancestral"].filter(s => s in model.solvers && s !== asked.solver)].slice(0, 4) : [asked.solver];
    // One after another they would take as long; together each is seen to go its own way.
    const group = make("div", { className: solvers.length > 1 ? "group" : "" });
    $("stage").prepend(group);
    await Promise.all(solvers.map(solver => draw({ ...asked, solver }, `${KINDS[kind]}: ${solver}`, stopping.signal, group)));
    while ($("stage").children.length > 12) $("stage").lastChild.remove();
    stopping = null;
    $("cancel").disabled = true;
    $("wish").querySelector(".main").disabled = false;
  };
  $("cancel").onclick = () => stopping?.abort();

  // ---- training

  let offered = null;

  async function form() {
    if (offered) return;
    offered = await json("offered");
    const to = $("begin").elements;
    options(to.data, offered.data.map(name => [name, name]));
    if (!offered.data.length) told($("refused"), "The studio was given no images to train on: start it as iddpm studio RUNS --data FOLDER");
    options(to.preset, Object.keys(offered.presets).filter(p => p !== "none").map(p => [p, p]), "auto");
    const help = () => { $("preset-help").textContent = offered.presets[to.preset.value]; };
    to.preset.onchange = help;
    help();
    const field = row => {
      const options = row.kind === "bool" ? ["", "True", "False"] : row.choices.length ? ["", ...row.choices] : null;
      const input = options ? make("select", { name: row.name }, ...options.map(o => make("option", { value: o, textContent: o || "as the recipe" }))) : make("input", { name: row.name, placeholder: "as the recipe" });
      input.dataset.kind = row.kind;
      return make("label", { title: row.help }, row.name, input);
    };
    const [first, rest] = [offered.flags.slice(0, 3), offered.flags.slice(3)];
    $("flags").append(...first.map(field), make("details", {}, make("summary", { textContent: "more" }), ...rest.map(field)));
    to.time.placeholder = "20m, 8h, 3d: or say how many steps";
  }

  $("begin").onsubmit = async e => {
    e.preventDefault();
    const to = $("begin").elements, asked = { action: "begin", data: to.data.value, run: to.run.value, preset: to.preset.value };
    for (const input of $("flags").querySelectorAll("input,select")) if (input.value.trim()) {
      const text = input.value.trim(), as = { bool: text === "True", number: Number(text) }[input.dataset.kind];
      asked[input.name] = as ?? text;
      if (Number.isNaN(as)) { told($("refused"), `${input.name}: a number is expected`); return; }
    }
    order(asked);
  };

  async function order(asked) {
    told($("refused"), "");
    try { await json("train", asked); await refresh(); } catch (e) { told($("refused"), e); }
  }

  function training() {
    if (!trainings.length) return;
    const boxes = [...trainings].reverse().map(t => {
      const r = runs.find(r => r.name === t.name), running = t.state === "running";
      const caption = make("figcaption", {}, t.name, make("span", { className: "state " + t.state, textContent: t.then ? "finishing" : t.state }), make("small", { textContent: r?.progress || "" }));
      const buttons = make("div", { className: "go" });
      const button = (text, asked) => { const b = make("button", { type: "button", textContent: text, onclick: () => order({ run: t.name, ...asked }) }); b.dataset.key = `${text} ${t.name}`; buttons.append(b); };
      if (running) { button("stop", { action: "stop" }); button("finish in 2 minutes", { action: "finish", time: "2m" }); }
      else if (r && !r.fault) button("go on", { action: "resume" });
      if (r && !r.fault) { const b = make("button", { type: "button", textContent: "look at it", onclick: () => { location.hash = "runs"; choose([t.name]); } }); b.dataset.key = "look " + t.name; buttons.append(b); }
      const log = make("pre", {}, make("code", { textContent: t.lines.slice(-12).join("\n") }));
      const bar = r?.share != null && running ? make("progress", { max: 1, value: r.share }) : "";
      if (bar) bar.setAttribute("aria-label", "progress of " + t.name);
      return make("figure", { className: "drawing training" }, caption, bar, t.error ? make("p", { className: "warning", role: "alert", textContent: t.error }) : "", buttons, make("p", { className: "soft" }, make("code", { textContent: t.command })), log);
    });
    const held = document.activeElement?.dataset?.key;
    $("trainings").replaceChildren(...boxes);
    if (held) document.querySelector(`[data-key="${CSS.escape(held)}"]`)?.focus();
  }

  const refresh = repeat(list, 2000);
  repeat(follow, 2000);
  opened();
})();
