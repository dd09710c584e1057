/* Noise on the inputs, as flatmin.batch.Gaussian; and nothing but the example, as Dirac. */
playground.define(function noise(lib) {
  lib.Gaussian = ({sigma}) => ({
    draw: (batch, random) => ({noise: random.normals(2 * batch.n)}),
    call: ({x, y, n}, {noise}) => ({x: lib.plus(x, noise, sigma), y, n}),
  });

  lib.Dirac = () => ({draw: () => ({}), call: batch => batch});
});
