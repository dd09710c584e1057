/* What can be set, and how the whole state is written into the address: only what differs from the
   defaults, or from those of a preset, such as #preset=edge&a.lr=0.1&seed=3. */
playground.define(function settings(lib) {
  const all = Infinity;
  const number = (label, values, initial, [low, high], more) =>
    ({label, values, initial, low, high, ...more});
  const choice = (label, values, initial, more) => ({label, values, initial, choice: true, ...more});
  const whole = {whole: true}, restart = {restart: true};
  const mixup = s => s.transform === "mixup", noise = s => s.transform === "noise";
  const sam = s => s.gradient === "SAM", penalty = s => s.gradient === "penalty";

  /** For both sides. */
  lib.SHARED = {
    data: choice("data", {}, "moons", restart),
    n: number("training examples n", [1, 2, 10, 20, 50, 100, 200, 500], 100, [1, 500],
      {...whole, ...restart}),
    noise: number("share of wrong labels", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 1], 0, [0, 1], restart),
    seed: number("seed", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 1, [0, 1e6], {...whole, ...restart}),
    radius: number("radius of the sharpness", [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2], 0.1, [0, 10]),
    scaled: choice("the sharpness's ball", {no: "a sphere", yes: "scales with the weights"}, "no"),
    view: choice("slice of the loss", {line: "a line", plane: "a plane"}, "line"),
    pause: number("pause at step", [100, 200, 500, 1000, 2000, 3000, 5000, 10000, all], all, [1, all],
      whole),
    speed: choice("speed", {1: "1 step/s", 10: "10 steps/s", 100: "100 steps/s", 300: "300 steps/s",
      full: "at full speed"}, "full"),
    sides: choice("networks", {1: "A alone", 2: "A and B"}, "1", restart),
  };
  for (const [key, set] of Object.entries(lib.DATA_SETS)) lib.SHARED.data.values[key] = set.name;

  /** For each side, by the stage of the pipeline. */
  lib.SIDE = {
    batch: {
      batch_size: number("batch size", [1, 2, 5, 10, 20, 50, all], all, [1, all], whole),
      transform: choice("transform", {none: "none", mixup: "mixup", noise: "input noise"}, "none"),
      alpha: number("mixup's α", [0, 0.1, 0.2, 0.5, 1, 2, 4, 8], 1, [0, 100], {when: mixup}),
      sigma: number("noise σ", [0, 0.05, 0.1, 0.2, 0.3, 0.5, 1], 0.2, [0, 10], {when: noise}),
    },
    model: {
      layers: number("hidden layers", [0, 1, 2, 3], 2, [0, 3], {...whole, ...restart}),
      width: number("units in each", [2, 4, 8, 16, 32], 16, [2, 32],
        {...whole, ...restart, when: s => s.layers > 0}),
      activation: choice("activation", {tanh: "tanh", ReLU: "ReLU"}, "tanh",
        {...restart, when: s => s.layers > 0}),
      rescaling: number("first layer times", [0.1, 0.2, 0.5, 1, 2, 5, 10], 1, [0.01, 100],
        {...restart, when: s => s.layers > 0 && s.activation === "ReLU"}),
    },
    loss: {
      loss: choice("loss", {"cross-entropy": "cross-entropy", quadratic: "quadratic"}, "cross-entropy"),
      flood_level: number("flood level b", [0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5], 0, [0, 10]),
    },
    gradient: {
      gradient: choice("gradient", {plain: "plain", SAM: "SAM", penalty: "gradient penalty"}, "plain"),
      rho: number("SAM's radius ρ", [0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10], 0.1, [0, 10],
        {when: sam}),
      p: number("SAM's norm p", [1, 2, all], 2, [1, all], {when: sam, only: true}),
      adaptive: choice("SAM's ball", {no: "fixed", yes: "adaptive"}, "no", {when: sam}),
      penalty: number("penalty λ", [0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1], 0.1, [0, 10],
        {when: penalty}),
    },
    optimizer: {
      lr: number("learning rate η", [0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.8, 1, 2, 5, 10], 0.2, [0, 10]),
      momentum: number("momentum", [0, 0.5, 0.9, 0.95], 0, [0, 0.999]),
      weight_decay: number("weight decay", [0, 1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1], 0, [0, 10]),
      ema: number("averaging (EMA)", [0, 0.9, 0.99, 0.999], 0, [0, 0.9999]),
    },
  };
  lib.SIDE_SETTINGS = Object.assign({}, ...Object.values(lib.SIDE));

  const initial = specs =>
    Object.fromEntries(Object.entries(specs).map(([key, spec]) => [key, spec.initial]));

  /** The state of a preset, or the defaults. */
  lib.stateOf = name => {
    const preset = Object.hasOwn(lib.PRESETS, name) ? lib.PRESETS[name] : {};
    const a = {...initial(lib.SIDE_SETTINGS), ...preset.a};
    return {
      preset: Object.hasOwn(lib.PRESETS, name) ? name : "none",
      shared: {...initial(lib.SHARED), ...preset.shared},
      a,
      b: {...a, ...preset.b},
    };
  };

  const written = value => (value === Infinity ? "inf" : String(value));

  /** A setting from a text, or an error that names it, the text and what is allowed. */
  lib.read = (key, spec, text) => {
    if (spec.choice) {
      if (Object.hasOwn(spec.values, text)) return text;
      throw new RangeError(`${key} must be one of ${Object.keys(spec.values).join(", ")}, got ${text}`);
    }
    const value = text === "inf" ? Infinity : text.trim() === "" ? NaN : Number(text);
    const good = spec.only ? spec.values.includes(value)
      : value >= spec.low && value <= spec.high && (!spec.whole || value === Infinity || value % 1 === 0);
    if (good) return value;
    throw new RangeError(
      `${key} must be ${spec.whole ? "a whole number" : "a number"} from ${written(spec.low)} to ` +
      `${written(spec.high)}${spec.only ? `, one of ${spec.values.map(written).join(", ")}` : ""}, got ${text}`);
  };

  const parts = state => [["", lib.SHARED, state.shared], ["a.", lib.SIDE_SETTINGS, state.a],
    ["b.", lib.SIDE_SETTINGS, state.b]];

  lib.writeState = state => {
    const base = parts(lib.stateOf(state.preset));
    const changes = parts(state).flatMap(([prefix, specs, values], i) => Object.keys(specs)
      .filter(key => values[key] !== base[i][2][key])
      .map(key => `${prefix}${key}=${encodeURIComponent(written(values[key]))}`));
    return [`preset=${state.preset}`, ...changes].join("&");
  };

  /** The state that an address describes, and in words what in it could not be read. */
  lib.readState = text => {
    const entries = text.split("&").filter(Boolean).map(entry => {
      const [key, ...rest] = entry.split("=");
      let value = rest.join("=");
      try { value = decodeURIComponent(value); } catch { /* stays as it is, and will be refused */ }
      return [key, value];
    });
    const problems = [], preset = entries.find(([key]) => key === "preset")?.[1] ?? "none";
    if (preset !== "none" && !Object.hasOwn(lib.PRESETS, preset)) {
      problems.push(`preset must be none or one of ${Object.keys(lib.PRESETS).join(", ")}, got ${preset}`);
    }
    const state = lib.stateOf(preset);
    for (const [key, value] of entries.filter(([key]) => key !== "preset")) {
      const found = parts(state).find(([prefix, specs]) =>
        key.startsWith(prefix) && Object.hasOwn(specs, key.slice(prefix.length)));
      try {
        if (!found) throw new RangeError(`there is no setting ${key}`);
        const name = key.slice(found[0].length);
        found[2][name] = lib.read(key, found[1][name], value);
      } catch (error) {
        problems.push(error.message);
      }
    }
    return {state, problems};
  };
});
