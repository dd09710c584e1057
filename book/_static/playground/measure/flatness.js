/* Sharpness: the rise of the loss under the worst perturbation found, as flatmin.measure.sharpness. */
playground.define(function flatness(lib) {
  const {norm, plus, scaled} = lib;

  /** Projected gradient ascent in the ball ‖T⁻¹ε‖₂ ≤ ρ; the highest loss on the way counts. */
  lib.sharpness = (objective, w, {rho, adaptive, steps = 5}) => {
    const T = w.map(x => (adaptive ? Math.abs(x) + 0.01 : 1));
    const at = u => w.map((x, i) => x + T[i] * u[i]);
    const values = [];
    let u = w.map(() => 0);
    for (let step = 0; step < steps; step++) {
      const {loss, gradient} = objective.gradient(at(u), true);
      values.push(loss);
      u = plus(u, lib.dualNormPerturbation(gradient.map((g, i) => T[i] * g), rho, 2));
      u = scaled(u, rho / Math.max(rho, norm(u)) || 0);
    }
    values.push(objective.raw(at(u)));
    return Math.max(...values) - values[0];
  };
});
