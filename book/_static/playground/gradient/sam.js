/* Sharpness-aware minimization, as flatmin.gradient.SAM. */
playground.define(function sam(lib) {
  const {norm, plus, scaled} = lib;

  /** ε̂: where a linear function with the gradient g is largest in the ball ‖ε‖_p ≤ ρ. */
  lib.dualNormPerturbation = (g, rho, p) => {
    const largest = g.reduce((m, x) => Math.max(m, Math.abs(x)), 0);
    if (largest === 0) return g.map(() => 0);
    if (p === Infinity) return g.map(x => rho * Math.sign(x));
    const v = g.map(x => x / largest);  // whose squares cannot leave the range of numbers
    if (p === 2) return scaled(v, rho / norm(v));
    const top = v.map(x => (Math.abs(x) === 1 ? x : 0));  // p = 1
    return scaled(top, rho / top.reduce((sum, x) => sum + Math.abs(x), 0));
  };

  /** ε̂ at w; in the adaptive form (Kwon et al. 2021) the ball scales with the weights. */
  lib.perturbation = (w, g, {rho, p, adaptive}) => {
    if (!adaptive) return lib.dualNormPerturbation(g, rho, p);
    const T = w.map(x => Math.abs(x) + 0.01);
    return lib.dualNormPerturbation(g.map((x, i) => T[i] * x), rho, p).map((x, i) => T[i] * x);
  };

  /** ∇L(w + ε̂).  With flooding ε̂ climbs the raw loss, and the loss at w + ε̂ is flooded. */
  lib.SAM = ball => (objective, w) => {
    const here = objective.gradient(w, true);
    const there = objective.gradient(plus(w, lib.perturbation(w, here.gradient, ball)));
    return {loss: here.loss, gradient: there.gradient, ascends: there.ascends};
  };
});
