/* The loss on a line or a plane through the weights, as flatmin.measure.loss_slice. */
playground.define(function slices(lib) {
  const {dot, norm, plus} = lib;

  /** A direction whose filters (rows of weight matrices) are as long as those of w; biases stay. */
  lib.filterNormalized = (direction, w, model) => {
    const out = direction.map(() => 0);
    for (const {inputs, outputs, weight} of model.layers) {
      for (let row = weight; row < weight + inputs * outputs; row += inputs) {
        const [d, own] = [direction, w].map(v => v.subarray(row, row + inputs));
        const factor = norm(own) / Math.max(norm(d), 1e-300);
        for (let k = 0; k < inputs; k++) out[row + k] = factor * d[k];
      }
    }
    return out;
  };

  const grid = (radius, points) =>
    Float64Array.from({length: points}, (_, i) => -radius + 2 * radius * i / (points - 1));

  lib.lossSlice = (objective, w, d, radius, points) =>
    grid(radius, points).map(a => objective.raw(plus(w, d, a)));

  /** In rows from the lowest to the highest coordinate along `e`; d and e should be orthogonal. */
  lib.lossPlane = (objective, w, d, e, radius, points) => {
    const line = grid(radius, points), values = new Float64Array(points * points);
    line.forEach((b, j) => line.forEach((a, i) => {
      values[j * points + i] = objective.raw(plus(plus(w, d, a), e, b));
    }));
    return values;
  };

  /** e without its part along d, as long as before; e itself where one of the two is 0. */
  lib.orthogonal = (e, d) => {
    const rest = plus(e, d, -dot(e, d) / (dot(d, d) || 1)), length = norm(rest);
    return length > 0 ? lib.scaled(rest, norm(e) / length) : e;
  };
});
