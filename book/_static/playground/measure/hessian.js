/* The Hessian's largest eigenvalue, by Lanczos' algorithm on exact Hessian-vector products. */
playground.define(function hessian(lib) {
  const {dot, norm, plus, scaled} = lib;

  /** Stops when the eigenvalue is known to the relative `tolerance`, or after `steps` products.
      Each new vector is made orthogonal to all before it, twice. */
  lib.largestEigenvalue = (product, start, {tolerance = 1e-3, steps = 40} = {}) => {
    const basis = [scaled(start, 1 / norm(start))], alpha = [], beta = [];
    steps = Math.min(steps, start.length);
    for (;;) {
      const k = basis.length, q = basis[k - 1], Hq = product(q);
      alpha.push(dot(q, Hq));
      let rest = Hq;
      for (let pass = 0; pass < 2; pass++) {
        for (const b of basis) rest = plus(rest, b, -dot(b, rest));
      }
      const length = norm(rest);
      const T = alpha.map((_, i) => alpha.map((_, j) =>
        i === j ? alpha[i] : Math.abs(i - j) === 1 ? beta[Math.min(i, j)] : 0));
      const small = length <= 1e-13 * norm(Hq);
      if (k % 3 === 0 || k === steps || small) {
        const {values, vectors} = lib.eigen(T);
        const top = values.indexOf(Math.max(...values));
        const error = Math.abs(length * vectors[k - 1][top]);  // an eigenvalue is as near as this
        if (k >= steps || small || error <= tolerance * Math.abs(values[top])) {
          let vector = start.map(() => 0);
          basis.forEach((b, i) => (vector = plus(vector, b, vectors[i][top])));
          return {value: values[top], vector};
        }
      }
      beta.push(length);
      basis.push(scaled(rest, 1 / length));
    }
  };
});
