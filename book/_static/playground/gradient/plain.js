/* The gradient itself, as flatmin.gradient.PlainGradient. */
playground.define(function plain(lib) {
  lib.PlainGradient = () => (objective, w) => objective.gradient(w);
});
