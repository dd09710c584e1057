/* Settings with something to see.  `effect` says what, and `shows` whether a run of `steps` steps has
   it: a test trains each with the seeds 1 to 10 and wants it in eight or more.  What did not show
   in eight was left out, not tuned.  `also` is a third setting for `shows`. */
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
      title: "1. Learn wrong labels by heart",
      lesson: "01_generalization.html#memorization-capacity-alone-does-not-bound-the-gap",
      task: "One label in five is wrong, and the network can learn them all. When it has, what has grown: the test loss, the test error, or both?",
      effect: "Both. The training error falls to at most 2 %, the test error ends at least 5 points above its lowest value, and the test loss at twice its lowest value or more.",
      shared: noisy, a: memory, steps: 3000,
      shows: a => a.now().train_error <= 2 && a.now().test_error >= lowest(a) + 5 &&
        a.now().test_loss >= 2 * Math.min(...a.losses.test_loss),
    },
    ring: {
      title: "2. The walk on a ring",
      lesson: "02_flooding.html#the-walk-on-a-ring",
      task: "Two weights and a bias, a quadratic loss, and a flood level: on the plane of the two weights the level is the shore of a lake. Where on the shore does the walk end?",
      effect: "Where the slope is smallest. While the loss stays within 5 % of the level on average, the gradient becomes at least a quarter shorter.",
      shared: {data: "gaussians", n: 100, view: "plane", speed: "100"},
      a: {layers: 0, loss: "quadratic", lr: 0.05, flood_level: 0.4}, steps: 3000,
      shows: a => {
        const slope = afterArrival(a, "gradient"), loss = a.losses.train_loss.slice(-20);
        return lib.mean(slope.slice(-20)) <= 0.75 * lib.mean(slope.slice(0, 2)) &&
          Math.abs(lib.mean(loss) / 0.4 - 1) <= 0.05;
      },
    },
    early_stopping: {
      title: "2. Flood, or stop early?",
      lesson: "02_flooding.html#when-to-use-it",
      task: "B keeps the training loss at 0.2, and A trains on. Whose test error is lowest, and when?",
      effect: "A's, early. At its best step A is at least 3 points better than B at the end. At the end B has the lower test loss.",
      shared: {...noisy, ...two}, a: memory, b: {flood_level: 0.2}, steps: 3000,
      shows: (a, b) => lowest(a) <= b.now().test_error - 3 && b.now().test_loss < a.now().test_loss,
    },
    penalty: {
      title: "3. Penalize the gradient",
      lesson: "03_gradient_penalty.html#flooding-two-rates-or-the-penalty-itself",
      task: "B also descends the squared length of the gradient. Does it end in a flatter place, and does it decide better there?",
      effect: "Flatter, yes: λ max ends below half of A's. The test error differs by less than 5 points, in either direction.",
      shared: {...noisy, ...two}, a: {width: 32, lr: 0.2}, b: {gradient: "penalty", penalty: 1}, steps: 4000,
      shows: (a, b) => b.now().largest < a.now().largest / 2 && Math.abs(b.now().test_error - a.now().test_error) < 5,
    },
    stiffness: {
      title: "4. Does one example's step help another?",
      lesson: "04_stiffness.html#through-training",
      task: "At first a step on one example helps the others of its class and harms the other class. What is left of that at the end?",
      effect: "Little. The mean cosine within a class falls from above 0.5 to below 0.3, and between the classes it rises from below −0.35 to above −0.25.",
      shared: noisy, a: {lr: 0.5}, steps: 3000,
      shows: a => {
        const {within, between} = a.curvature;
        return within[0] > 0.5 && within.at(-1) < 0.3 && between[0] < -0.35 && between.at(-1) > -0.25;
      },
    },
    mixup: {
      title: "5. Mixup and wrong labels",
      lesson: "05_mixup.html#wrong-labels",
      task: "B trains on mixtures of two examples and of their labels. How many of the 20 wrong labels does it learn?",
      effect: "At most half of them, while A learns at least 18. Its test error is at least 5 points lower.",
      shared: {...noisy, ...two}, a: memory, b: {transform: "mixup", alpha: 1}, steps: 3000,
      shows: (a, b) => a.now().learned >= 18 && b.now().learned <= 10 &&
        late(b, "losses", "test_error") <= late(a, "losses", "test_error") - 5,
    },
    sam: {
      title: "6. SAM: flatter, and better?",
      lesson: "06_sam.html#wrong-labels",
      task: "B uses SAM with the radius 0.1. How much smaller is its λ max, and how many wrong labels fewer does it learn?",
      effect: "λ max ends below half of A's, and yet B learns at least 18 of the 20 wrong labels.",
      shared: {...noisy, ...two}, a: memory, b: {gradient: "SAM", rho: 0.1}, steps: 3000,
      shows: (a, b) => b.now().largest < a.now().largest / 2 && b.now().learned >= 18,
    },
    large_radius: {
      title: "6. Too large a radius",
      lesson: "06_sam.html#does-it-generalize",
      task: "B uses SAM with the radius 1. What becomes of its training loss?",
      effect: "Nothing: from so far away the gradient points nowhere useful. B's training error stays above 30 %, while A's falls to at most 2 %.",
      shared: {...noisy, ...two}, a: memory, b: {gradient: "SAM", rho: 1}, steps: 3000,
      shows: (a, b) => late(b, "losses", "train_error") > 30 && a.now().train_error <= 2,
    },
    rescaled: {
      title: "7. The same function, sharper",
      lesson: "07_sharpness.html#the-same-function-as-sharp-as-you-like",
      task: "In B the first layer is multiplied by 5 and the weights of the second divided by 5, which changes no answer of a ReLU network. Whose λ max is larger, before the first step?",
      effect: "B's, at least three times, at the same losses. Let the ball of the sharpness scale with the weights, and the two agree to within a tenth.",
      shared: {data: "moons", n: 100, radius: 0.1, ...two},
      a: {activation: "ReLU", lr: 0.02}, b: {rescaling: 5}, steps: 0,
      shows: (a, b) => {
        const adaptive = run => lib.sharpness(run.objective(), run.weights, {rho: 0.1, adaptive: true});
        return b.now().largest >= 3 * a.now().largest && Math.abs(b.now().test_loss - a.now().test_loss) < 1e-9 &&
          Math.abs(adaptive(b) / adaptive(a) - 1) < 0.1;
      },
    },
    edge: {
      title: "8. The edge of stability",
      lesson: "08_spectrum.html#why-the-edge-holds",
      task: "Plain descent with the rates 0.2 and 0.4. Where does λ max end in each, and where would it end with 0.8?",
      effect: "At 2/η: in the last third of the run its mean lies between 0.8 and 1.3 times 10, 5 and 2.5.",
      shared: {...noisy, ...two}, a: bowl, b: {lr: 0.4}, also: {lr: 0.8}, steps: 4000,
      shows: (...runs) => runs.every(run => {
        const ratio = late(run, "curvature", "largest") * run.side.lr / 2;
        return ratio > 0.8 && ratio < 1.3;
      }),
    },
    sam_edge: {
      title: "8. SAM lowers the edge",
      lesson: "08_spectrum.html#sam-lowers-the-edge",
      task: "Both sides have the rate 0.2, and B uses SAM with the radius 0.05. The edge of A is 10: where is that of B, and does λ max follow it?",
      effect: "Between 2 and 4. In the last third of the run λ max lies between 0.9 and 1.2 times the formula of Chapter 8, on average.",
      shared: {...round, ...two}, a: bowl, b: {gradient: "SAM", rho: 0.05}, steps: 3000,
      shows: (a, b) => {
        const edge = late(b, "curvature", "edge"), ratio = late(b, "curvature", "largest") / edge;
        return edge > 2 && edge < 4 && ratio > 0.9 && ratio < 1.2;
      },
    },
    together: {
      title: "9. All stages at once",
      lesson: "09_together.html#what-each-place-contributes",
      task: "B has mixup, SAM, weight decay and averaging, and makes fewer errors than A. Which of the four does most of it? Switch them off one at a time.",
      effect: "All together, B's test error is at least 5 points lower over the last third of the run. How much each does alone you have just measured, at one seed.",
      shared: {...noisy, ...two}, a: memory,
      b: {transform: "mixup", gradient: "SAM", rho: 0.1, weight_decay: 0.001, ema: 0.99}, steps: 3000,
      shows: (a, b) => late(b, "losses", "test_error") <= late(a, "losses", "test_error") - 5,
    },
    luck: {
      title: "10. Fool yourself",
      lesson: "10_measuring.html#the-best-of-five",
      task: "A has the rate 0.1 and B 0.101, and nothing else differs. Which one would you publish, and would you still after three other seeds?",
      effect: "Their test errors at the last step differ by a point or more, and the better one changes with the seed.",
      shared: {...noisy, ...two}, a: {...memory, batch_size: 5}, b: {lr: 0.101}, steps: 3000,
      shows: (a, b) => Math.abs(a.now().test_error - b.now().test_error) >= 1,
    },
  };
  for (const preset of Object.values(lib.PRESETS)) {
    preset.shared = {pause: preset.steps || Infinity, ...preset.shared};
  }
});
