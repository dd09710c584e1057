/* The exponential moving average of the weights, as flatmin.optimizer.EMA.  At decay 0 it is the
   weights themselves. */
playground.define(function averaging(lib) {
  lib.EMA = (inner, decay) => ({
    init: w => ({inner: inner.init(w), average: w}),
    call(g, w, state) {
      const [next, innerState] = inner.call(g, w, state.inner);
      const average = state.average.map((mean, i) => decay * mean + (1 - decay) * next[i]);
      return [next, {inner: innerState, average}];
    },
    evaluated: state => state.average,
  });
});
