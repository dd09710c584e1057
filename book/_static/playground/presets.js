/* Settings with something to see.  The page has a section for each, with its name, task and promise;
   `shows` says whether a run of `steps` steps keeps the promise.  A test trains each with ten seeds and
   wants eight of them to; what less than eight did was left out, not tuned.  `also` is a third
   setting for `shows`. */
playground.define(function presets(lib) {
  const noisy = {data: "moons", n: 100, noise: 0.2};
  const memory = {layers: 2, width: 32, lr: 0.1, momentum: 0.9};  // learns every wrong label
  const round = {data: "circles", n: 100};
  const bowl = {layers: 2, width: 16, loss: "quadratic", lr: 0.2};
  const two = {sides: "2"};
  const late = (run, table, name) => lib.mean(run[table][name].slice(-Math.ceil(run[table][name].length / 3)));
  const lowest = run => Math.min(...run.losses.test_error);
  /** The readings of a column from the step on at which the flood level was reached. */
  const afterArrival = (run, name) => run.losses[name].filter((_, i) => run.losses.step[i] >= run.step - run.atLevel);

  lib.PRESETS = {
    memorize: {
      shared: noisy, a: memory, steps: 3000,
      shows: a => a.now().train_error <= 2 && a.now().test_error >= lowest(a) + 5 &&
        a.now().test_loss >= 2 * Math.min(...a.losses.test_loss),
    },
    ring: {
      shared: {data: "gaussians", n: 100, view: "plane", speed: "300"},
      a: {layers: 0, loss: "quadratic", lr: 0.05, flood_level: 0.4}, steps: 3000,
      shows: a => {
        const slope = afterArrival(a, "gradient"), loss = a.losses.train_loss.slice(-20);
        return lib.mean(slope.slice(-20)) <= 0.75 * lib.mean(slope.slice(0, 2)) &&
          Math.abs(lib.mean(loss) / 0.4 - 1) <= 0.05;
      },
    },
    early: {
      shared: {...noisy, ...two}, a: memory, b: {flood_level: 0.2}, steps: 3000,
      shows: (a, b) => lowest(a) <= b.now().test_error - 3 && b.now().test_loss < a.now().test_loss &&
        a.now().lowest_at <= b.step - b.atLevel,  // before B has reached the level
    },
    penalty: {
      shared: {...noisy, ...two}, a: {width: 32, lr: 0.2}, b: {gradient: "penalty", penalty: 1}, steps: 4000,
      shows: (a, b) => b.now().largest < a.now().largest / 2 && Math.abs(b.now().test_error - a.now().test_error) < 5,
    },
    stiffness: {
      shared: noisy, a: {lr: 0.5}, steps: 3000,
      shows: a => {
        const {within, between} = a.curvature;
        return within[0] > 0.5 && within.at(-1) < 0.3 && between[0] < -0.35 && between.at(-1) > -0.25;
      },
    },
    mixup: {
      shared: {...noisy, ...two}, a: memory, b: {transform: "mixup", alpha: 1}, steps: 3000,
      shows: (a, b) => a.now().learned >= 18 && b.now().learned <= 10 &&
        late(b, "losses", "test_error") <= late(a, "losses", "test_error") - 5,
    },
    flatter: {
      shared: {...noisy, ...two}, firstSeed: 11, a: bowl, b: {gradient: "SAM", rho: 0.1}, steps: 3000,
      shows: (a, b) => b.now().sharpness < a.now().sharpness / 2 && b.now().train_loss < a.now().train_loss + 0.1,
    },
    rescaled: {
      shared: {data: "moons", n: 100, pause: 2000, ...two}, firstSeed: 11,
      a: {activation: "ReLU", lr: 0.02}, b: {rescaling: 10}, steps: 0,
      shows: (a, b) => b.now().largest >= 3 * a.now().largest && b.now().sharpness >= 2 * a.now().sharpness &&
        Math.abs(b.now().test_loss - a.now().test_loss) < 1e-9,
    },
    edge: {
      shared: {...noisy, ...two, seed: 2}, a: bowl, b: {lr: 0.4}, also: {lr: 0.8}, steps: 4000,
      shows: (...runs) => runs.every(run => {
        const ratio = late(run, "curvature", "largest") * run.side.lr / 2;
        return ratio > 0.8 && ratio < 1.3;
      }),
    },
    sam: {
      shared: {...round, ...two}, a: bowl, b: {gradient: "SAM", rho: 0.05}, steps: 3000,
      shows: (a, b) => {
        const edge = late(b, "curvature", "edge"), ratio = late(b, "curvature", "largest") / edge;
        return edge > 2 && edge < 4 && ratio > 0.9 && ratio < 1.2;
      },
    },
    together: {
      shared: {...noisy, ...two}, a: memory,
      b: {transform: "mixup", gradient: "SAM", rho: 0.1, weight_decay: 0.001, ema: 0.99}, steps: 3000,
      shows: (a, b) => late(b, "losses", "test_error") <= late(a, "losses", "test_error") - 5,
    },
  };
  for (const preset of Object.values(lib.PRESETS)) {
    preset.shared = {pause: preset.steps || Infinity, ...preset.shared};
  }
});
