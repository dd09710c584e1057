/* Flooding, as flatmin.loss.Flooding. */
playground.define(function flooding(lib) {
  /** |ℓ − b| + b, and its derivative by ℓ: below the level the gradient turns around. */
  lib.flood = (loss, level) => [Math.abs(loss - level) + level, Math.sign(loss - level)];
});
