/* Stiffness: the cosine of two examples' gradients, as flatmin.measure.stiffness. */
playground.define(function gram(lib) {
  const {dot, norm} = lib;

  /** Mean cosine over all pairs of one class, and over all pairs of two classes; NaN if there are none.
      The sum of the unit gradients holds all cosines: ‖Σu‖² = Σ_ij cos_ij.  A zero gradient has 0. */
  lib.stiffness = (model, w, {x, y, n}, criterion) => {
    const sums = [0, 1].map(() => new Float64Array(model.length)), counts = [0, 0], own = [0, 0];
    for (let i = 0; i < n; i++) {
      const one = {x: x.subarray(2 * i, 2 * i + 2), y: y.subarray(i, i + 1), n: 1};
      const {gradient} = model.gradient(w, one, criterion), length = norm(gradient);
      counts[y[i]] += 1;
      if (length === 0) continue;
      own[y[i]] += 1;
      for (let k = 0; k < gradient.length; k++) sums[y[i]][k] += gradient[k] / length;
    }
    const mean = (sum, pairs) => (pairs > 0 ? sum / pairs : NaN);
    const within = sums.reduce((sum, s, c) => sum + dot(s, s) - own[c], 0);
    return {
      within: mean(within, counts.reduce((sum, c) => sum + c * (c - 1), 0)),
      between: mean(dot(...sums), counts[0] * counts[1]),
    };
  };
});
