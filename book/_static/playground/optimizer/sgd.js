/* Gradient descent with momentum and weight decay, as flatmin.optimizer.SGD. */
playground.define(function sgd(lib) {
  lib.SGD = ({lr, momentum, weight_decay}) => ({
    init: w => w.map(() => 0),
    /** v ← μv + (g + λw), w ← w − ηv. */
    call(g, w, velocity) {
      const v = velocity.map((old, i) => momentum * old + (g[i] + weight_decay * w[i]));
      return [lib.plus(w, v, -lr), v];
    },
  });
});
