/* The training step as a pipeline, as flatmin.pipeline: batch → model → loss → gradient → optimizer. */
playground.define(function pipeline(lib) {
  /** What sits in each stage, from the settings of one side. */
  lib.recipe = s => ({
    criterion: lib.LOSSES[s.loss],
    batch: {none: lib.Dirac, mixup: lib.Mixup, noise: lib.Gaussian}[s.transform](s),
    level: s.flood_level,
    gradient: {plain: lib.PlainGradient, SAM: lib.SAM, penalty: lib.GradientPenalty}[s.gradient](
      {...s, adaptive: s.adaptive === "yes"}),
    optimizer: lib.EMA(lib.SGD(s), s.ema),
  });

  /** The loss of one batch as a function of the weights.  `raw` leaves the loss stage out. */
  lib.objective = (model, batch, criterion, level = 0) => ({
    raw: w => model.loss(w, batch, criterion),
    gradient(w, raw = false) {
      const {loss, gradient} = model.gradient(w, batch, criterion);
      if (raw) return {loss, gradient, ascends: false};
      const [flooded, sign] = lib.flood(loss, level);
      return {loss: flooded, gradient: lib.scaled(gradient, sign), ascends: sign < 0};
    },
    hessianProduct(w, v, raw = false) {
      const product = model.hessianProduct(w, v, batch, criterion);
      return raw ? product : lib.scaled(product, lib.flood(model.loss(w, batch, criterion), level)[1]);
    },
  });

  /** One step.  `draw` is what the batch stage's method `draw` returned. */
  lib.step = (model, recipe, {w, optimizer}, batch, draw) => {
    const shown = recipe.batch.call(batch, draw);                                       // batch
    const objective = lib.objective(model, shown, recipe.criterion, recipe.level);      // loss
    const {loss, gradient, ascends} = recipe.gradient(objective, w);                    // gradient
    const [next, state] = recipe.optimizer.call(gradient, w, optimizer);                // optimizer
    return {state: {w: next, optimizer: state}, loss, ascends, shown};
  };
});
