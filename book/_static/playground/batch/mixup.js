/* Mixup: convex combinations of examples and of their labels, as flatmin.batch.Mixup. */
playground.define(function mixup(lib) {
  lib.Mixup = ({alpha}) => ({
    /** λ ~ Beta(α, α), once for the batch, and a partner for each example. */
    draw: (batch, random) => ({lambda: random.beta(alpha), partners: random.permutation(batch.n)}),

    /** x̃ = λx + (1−λ)x_π, ỹ = λy + (1−λ)y_π. */
    call({x, y, n}, {lambda, partners}) {
      const other = 1 - lambda;
      return {
        x: x.map((value, i) => lambda * value + other * x[2 * partners[i >> 1] + (i & 1)]),
        y: y.map((value, i) => lambda * value + other * y[partners[i]]),
        n,
      };
    },
  });
});
