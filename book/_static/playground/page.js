/* The page: controls, frames from the worker, and the address that holds all settings. */
(() => {
  const {lib, draw} = playground, {SHARED, SIDE, SIDE_SETTINGS, PRESETS} = lib;
  const root = document.getElementById("the-playground");
  const element = (tag, attributes = {}, ...children) => {
    const e = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) e.addEventListener(name.slice(2), value);
      else if (value !== false) e.setAttribute(name, value === true ? "" : value);
    }
    e.append(...children);
    return e;
  };

  /** The section of the page that describes a task. */
  const section = key => document.getElementById(key).closest("section");
  const title = key => section(key).querySelector("h3").firstChild.textContent;
  const copied = e => {
    const copy = e.cloneNode(true);
    for (const named of [copy, ...copy.querySelectorAll("[id]")]) named.removeAttribute("id");
    return copy;
  };

  // ------------------------------------------------------------------------------- the worker

  let worker = null, ready = false;
  const fail = reason => {
    worker?.terminate();
    root.querySelector(".playground-live")?.remove();
    root.querySelector(".playground-recorded").hidden = false;
    root.querySelector(".playground-why").textContent =
      `The playground ${ready ? "has stopped" : "could not start here"}: ${reason}. This is a recorded picture.`;
  };
  try {
    const source = `${playground.source}\nonmessage = lib.serve(message => postMessage(message));`;
    worker = new Worker(URL.createObjectURL(new Blob([source], {type: "text/javascript"})));
  } catch (error) {
    return fail(`this browser lets the page start no worker (${error.message})`);
  }
  const patience = setTimeout(() => fail("its worker did not answer within ten seconds"), 10_000);
  worker.onerror = event => fail(`its worker stopped (${event.message || "the browser refused it"})`);
  const send = (type, more = {}) => worker.postMessage({type, ...more});

  /** What was ordered last, and what the page wants; frames from before that order are not believed. */
  let turn = 0, playing = false;
  const order = (type, more) => {
    turn += 1;
    playing = type === "play";
    send(type, {...more, turn});
    play.textContent = playing ? "Pause" : "Play";
  };

  // ---------------------------------------------------------------------------------- the state

  /** The state in the address.  A link to the section of a task sets its preset; other sections of the
      page, and no fragment at all, say nothing about the state. */
  const fromAddress = () => {
    const fragment = location.hash.slice(1);
    const linked = Object.keys(PRESETS).find(key => key === fragment || section(key).id === fragment);
    if (!linked) return fragment.includes("=") ? lib.readState(fragment) : null;
    history.replaceState(null, "", `#preset=${linked}`);
    setTimeout(() => root.scrollIntoView());  // after the browser has gone to the section
    return lib.readState(`preset=${linked}`);
  };
  let {state, problems} = fromAddress() ?? lib.readState("preset=mixup");
  if (!location.hash) history.replaceState(null, "", "#preset=mixup");  // so that Back leads here
  let data = null, frame = null, hiddenWhilePlaying = false, quiet = null;
  const written = () => lib.writeState(state);

  /** Takes over a state: with a new run if what it starts from has changed. */
  const apply = (next, restart = false) => {
    const parts = [[SHARED, "shared"], [SIDE_SETTINGS, "a"], [SIDE_SETTINGS, "b"]];
    restart ||= parts.some(([specs, part]) => Object.keys(specs).some(key =>
      specs[key].restart && next[part][key] !== state[part][key]));
    state = next;
    show();
    if (!restart) return send("change", {state});
    const goOn = playing;
    order("restart", {state});
    if (goOn) order("play");
  };
  const change = edit => {
    const next = structuredClone(state);
    edit(next);
    say("");
    apply(next);
    if (location.hash.slice(1) !== written()) location.hash = written();  // a step that Back undoes
  };
  addEventListener("hashchange", () => {
    if (location.hash.slice(1) === written()) return;
    const read = fromAddress();
    if (!read) return;
    problems = read.problems;
    const other = read.state.preset !== state.preset;
    apply(read.state, other);
    say(problems.join(". "));
  });

  // ------------------------------------------------------------------------------- the controls

  const SIDES = [["a", "A"], ["b", "B"]];
  const NAMES = {batch_size: {Infinity: "all"}, p: {Infinity: "∞"}, pause: {Infinity: "never"}};
  const text = (key, spec, value) => {
    if (spec.choice) return spec.values[value];
    if (key === "noise") return `${Number((100 * value).toPrecision(6))} %`;
    return NAMES[key]?.[value] ?? String(value);
  };
  const selects = [];

  const select = (key, spec, part, label) => {
    const box = element("select", {"aria-label": label, "data-key": `${part}.${key}`, onchange: () => change(next => {
      next[part][key] = spec.choice ? box.value : Number(box.value);
    })});
    selects.push(() => {
      const value = state[part][key];
      const values = spec.choice ? Object.keys(spec.values)
        : [...new Set([...spec.values, value])].sort((x, y) => x - y);
      if (box.dataset.values !== String(values)) {
        box.dataset.values = values;
        box.replaceChildren(...values.map(v => element("option", {value: v}, text(key, spec, v))));
      }
      box.value = value;
    });
    return box;
  };

  const table = element("table", {class: "playground-settings"},
    element("caption", {}, "Settings. Changing data, model or networks restarts the run."));
  const heading = (title, cells) => table.append(element("tbody", {}, element("tr", {class: "stage"},
    element("th", {scope: "colgroup", ...(cells ? {} : {colspan: 3})}, title), ...(cells ?? []))));
  const row = (label, cells) => {
    const line = element("tr", {}, element("th", {scope: "row"}, label), ...cells);
    table.lastElementChild.append(line);
    return line;
  };
  const shared = (title, keys) => {
    heading(title);
    for (const key of keys) {
      row(SHARED[key].label, [element("td", {colspan: 2}, select(key, SHARED[key], "shared", SHARED[key].label))]);
    }
  };
  shared("data", ["data", "n", "noise", "seed"]);
  for (const [stage, specs] of Object.entries(SIDE)) {
    heading(stage, SIDES.map(([part, name]) => element("th", {scope: "col", class: `side ${part}`}, name)));
    for (const [key, spec] of Object.entries(specs)) {
      const cells = SIDES.map(([part, name]) => element("td", {class: `side ${part}`},
        select(key, spec, part, `${spec.label}, ${name}`)));
      const line = row(spec.label, cells);
      selects.push(() => {
        const used = SIDES.map(([part]) => !spec.when || spec.when(state[part]));
        const two = state.shared.sides === "2";
        cells.forEach((cell, i) => (cell.firstChild.hidden = !used[i]));
        line.hidden = !used[0] && !(two && used[1]);
        line.classList.toggle("differs", two && (used[0] || used[1]) && state.a[key] !== state.b[key]);
      });
    }
  }
  shared("instruments", ["radius", "scaled", "view"]);
  shared("the run", ["sides", "speed", "pause"]);

  const say = words => {
    clearTimeout(quiet);
    status.textContent = words;
  };
  const status = element("p", {class: "playground-status", role: "status"});
  const playOrPause = () => order(playing ? "pause" : "play");
  const play = element("button", {type: "button", class: "play", onclick: playOrPause}, "Play");
  const button = (label, action) => element("button", {type: "button", onclick: action}, label);
  const counter = element("span", {class: "playground-counter"});
  const copyLink = async () => {
    try {
      await navigator.clipboard.writeText(`${location.href.split("#")[0]}#${written()}`);
      say("Copied. The link holds all settings, and starts a new run with them.");
      quiet = setTimeout(() => say(""), 6000);
    } catch {
      say(`This browser does not let the page copy. Put this after the page's address: #${written()}`);
    }
  };
  const toSettings = button("Settings", () => {
    table.scrollIntoView();
    table.querySelector("select").focus({preventScroll: true});
  });
  toSettings.classList.add("to-settings");
  const toolbar = element("div", {class: "playground-toolbar", role: "group", "aria-label": "Training"},
    play, button("Step", () => order("step")), button("Restart", () => order("restart", {state})),
    toSettings, counter);
  const copying = element("div", {class: "playground-copying"},
    button("Copy settings A to B", () => change(next => {
      next.b = structuredClone(next.a);
      next.shared.sides = "2";
    })),
    button("Copy link", copyLink), status);

  const choose = key => {
    apply(lib.stateOf(key), true);
    location.hash = written();
    say("");
  };
  const preset = element("select", {id: "playground-preset", onchange: () => choose(preset.value)},
    element("option", {value: "none"}, "no task: play"),
    ...Object.keys(PRESETS).map(key => element("option", {value: key}, title(key))));
  for (const key of Object.keys(PRESETS)) {
    section(key).querySelector("details").before(element("p", {class: "playground"}, button("Try it", () => {
      choose(key);
      root.scrollIntoView();
      play.focus();
    })));
  }
  const task = element("div", {class: "playground-task"});
  const showTask = () => {
    preset.value = state.preset;
    if (task.dataset.preset === state.preset) return;
    task.dataset.preset = state.preset;
    if (state.preset === "none") {
      task.replaceChildren(element("p", {}, "Choose a task above, or set what you like and press Play. " +
        "Nothing you do here can break."));
      return;
    }
    const [words, promise] = ["p", "details"].map(tag => copied(section(state.preset).querySelector(tag)));
    words.prepend(element("strong", {}, "Guess first. "));
    promise.open = false;
    task.replaceChildren(words, promise);
  };

  // -------------------------------------------------------------------------------- the pictures

  const figure = (title, className = "") => {
    const canvas = element("canvas", {role: "img", "aria-label": title});
    const box = element("figure", {class: className}, element("figcaption", {}, title), canvas);
    return {canvas, caption: title, figure: box};
  };
  const sides = SIDES.map(([part, name]) => {
    const map = figure(`${name}: what the network says`, "square");
    const slice = figure(`${name}: the loss nearby`, "square");
    const words = element("p", {class: "playground-words"});
    return {map, slice, words, box: element("section", {class: `side ${part}`, "aria-label": `Setting ${name}`},
      words, element("div", {class: "pair"}, map.figure, slice.figure))};
  });
  const column = (side, table, name) => [...frame.sides[side][table][name]];
  const over = (table, name, dash) => frame.sides.map((_, side) =>
    ({x: column(side, table, "step"), y: column(side, table, name), side, dash}));
  const charts = {
    "Loss: training, test (dashed)": () => ({
      lines: [...over("losses", "train_loss"), ...over("losses", "test_loss", "dashed")], low: 0, levels: levels()}),
    "Error in %: training, test (dashed)": () => ({
      lines: [...over("losses", "train_error"), ...over("losses", "test_error", "dashed")], low: 0}),
    "λ max, its edge (dotted), log scale": () => ({
      lines: [...over("curvature", "largest"), ...over("curvature", "edge", "dotted")], log: true}),
    "Sharpness, log scale": () => ({lines: over("curvature", "sharpness"), log: true}),
    "Length of the gradient, log scale": () => ({lines: over("losses", "gradient"), log: true}),
    "Stiffness: one class, two (dashed)": () => ({
      lines: [...over("curvature", "within"), ...over("curvature", "between", "dashed")], low: -1, high: 1}),
  };
  const levels = () => SIDES.slice(0, frame.sides.length)
    .map(([part], side) => ({value: state[part].flood_level, side})).filter(({value}) => value > 0);
  const chartBoxes = Object.entries(charts).map(([title, spec]) => ({...figure(title, "chart"), spec}));

  const percent = v => `${v.toFixed(1)} %`, whole = v => v.toLocaleString("en");
  const READINGS = [
    ["step", "step", whole],
    ["training loss", "train_loss"], ["test loss", "test_loss"],
    ["training error", "train_error", percent], ["test error", "test_error", percent],
    ["lowest test error so far", "lowest", percent], ["at step", "lowest_at", whole],
    ["length of the gradient", "gradient"], ["λ max", "largest"], ["its edge", "edge"],
    ["sharpness", "sharpness"], ["stiffness, one class", "within"], ["stiffness, two classes", "between"],
  ];
  const cells = READINGS.map(() => SIDES.map(([part]) => element("td", {class: `side ${part}`})));
  const readings = element("table", {class: "playground-readings"},
    element("caption", {}, "Readings"),
    element("thead", {}, element("tr", {}, element("th", {scope: "col"}, "quantity"),
      ...SIDES.map(([part, name]) => element("th", {scope: "col", class: `side ${part}`}, name)))),
    element("tbody", {}, ...READINGS.map(([label], i) =>
      element("tr", {}, element("th", {scope: "row"}, label), ...cells[i]))));

  const reading = (v, format) =>
    v === Infinity ? "∞" : Number.isFinite(v) ? (format ?? (v => v.toPrecision(3)))(v) : "–";

  const drawAll = () => {
    if (!frame || !data) return;
    const highest = Math.max(...frame.sides.flatMap(side => [...side.slice.values]));
    frame.sides.forEach((side, i) => {
      const {map, slice, words} = sides[i];
      draw.map(map.canvas, side, data, data.reach);
      if (side.slice.size) draw.plane(slice.canvas, side.slice, i, state[SIDES[i][0]].flood_level);
      else draw.line(slice.canvas, side.slice, i, levels().filter(level => level.side === i), highest);
      words.setAttribute("aria-live", frame.playing ? "off" : "polite");
      if (words.textContent !== side.words) words.textContent = side.words;
      words.classList.toggle("stopped", Boolean(side.stopped));
      READINGS.forEach(([, key, format], k) => {
        cells[k][i].textContent = key === "step" ? reading(side.step, format) : reading(side.now[key], format);
      });
      if (frame.playing) return;
      const {now, slice: {values}} = side, middle = values[(values.length - 1) / 2];
      map.canvas.setAttribute("aria-label", `${map.caption} at step ${side.step}, over ` +
        `${data.train.n} training examples: training error ${percent(now.train_error)}, ` +
        `test error ${percent(now.test_error)}.`);
      slice.canvas.setAttribute("aria-label", `${slice.caption}: ${lib.digits(middle)} at the weights, ` +
        `up to ${lib.digits(Math.max(...values))} in the picture.`);
    });
    for (const {canvas, caption, spec} of chartBoxes) {
      const {lines, ...more} = spec();
      draw.chart(canvas, {lines, names: frame.sides.map((_, i) => SIDES[i][1]), ...more});
      if (frame.playing) continue;
      const ends = frame.sides.map((_, i) => {
        const values = lines.filter(line => line.side === i).map(line => reading(line.y.at(-1)));
        return `${SIDES[i][1]} ${values.join(", ")}`;
      });
      canvas.setAttribute("aria-label", `${caption}. Now: ${ends.join("; ")}.`);
    }
  };

  const show = () => {
    selects.forEach(update => update());
    live.classList.toggle("two", state.shared.sides === "2");
    showTask();
    drawAll();
  };

  const live = element("div", {class: "playground-live"},
    element("p", {class: "playground-choice"}, element("label", {for: "playground-preset"}, "Start from "), preset),
    task, toolbar, copying,
    element("div", {class: "playground-body"},
      element("div", {class: "playground-figures"},
        element("div", {class: "playground-sides"}, ...sides.map(side => side.box)),
        element("div", {class: "playground-charts"}, ...chartBoxes.map(chart => chart.figure)), readings),
      table));

  let requested = false;
  const redraw = () => {
    if (requested) return;
    requested = true;
    requestAnimationFrame(() => {
      requested = false;
      try {
        drawAll();
      } finally {
        send("drawn");
      }
    });
  };

  worker.onmessage = ({data: message}) => {
    if (message.type === "ready") {
      clearTimeout(patience);
      ready = true;
      root.querySelector(".playground-recorded").hidden = true;
      root.append(live);
      show();
      say(problems.join(". "));
      order("restart", {state});
    } else if (message.type === "data") {
      data = message;
    } else {
      frame = message;
      if (frame.turn === turn) playing = frame.playing;
      play.textContent = playing ? "Pause" : "Play";
      const step = Math.max(...frame.sides.map(side => side.step));
      counter.textContent = `step ${step.toLocaleString("en")}` +
        (frame.playing && frame.speed ? `, ${Math.round(frame.speed).toLocaleString("en")} a second` : "");
      root.dataset.playing = playing || frame.playing;
      redraw();
    }
  };

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      hiddenWhilePlaying = playing;
      if (playing) order("pause");
    } else if (hiddenWhilePlaying) order("play");
  });
  new MutationObserver(drawAll).observe(document.documentElement,
    {attributes: true, attributeFilter: ["data-theme"]});
  // the buttons stay below the page's own bar
  const bar = document.querySelector(".bd-header-article");
  let width = 0;
  new ResizeObserver(() => {
    if (width === root.clientWidth) return;
    width = root.clientWidth;
    root.style.setProperty("--bar", `${bar?.offsetHeight ?? 0}px`);
    drawAll();
  }).observe(root);
})();
