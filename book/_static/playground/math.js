/* Vectors, random numbers and the eigenvalues of small matrices, in double precision. */
playground.define(function mathematics(lib) {
  lib.dot = (a, b) => {
    let sum = 0;
    for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
    return sum;
  };
  lib.norm = v => Math.sqrt(lib.dot(v, v));
  lib.scaled = (v, factor) => v.map(x => factor * x);
  /** a + factor b, a new vector. */
  lib.plus = (a, b, factor = 1) => a.map((x, i) => x + factor * b[i]);
  lib.mean = values => values.reduce((sum, v) => sum + v, 0) / values.length;

  /** Random numbers that are a pure function of seed and purpose: Marsaglia's xorshift128 (2003). */
  lib.Stream = class Stream {
    constructor(seed, purpose) {
      let h = 0x9e3779b9 ^ seed;
      const mixed = () => {
        h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
        h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
        return (h ^= h >>> 16) >>> 0;
      };
      for (const letter of `${seed}/${purpose}`) h = mixed() ^ letter.codePointAt(0);
      this.state = [mixed(), mixed(), mixed(), mixed() | 1];
      for (let i = 0; i < 16; i++) this.bits();
    }
    bits() {
      const [a, b, c, d] = this.state;
      const t = a ^ (a << 11);
      this.state = [b, c, d, d ^ (d >>> 19) ^ t ^ (t >>> 8)];
      return this.state[3] >>> 0;
    }
    /** Uniform in (0, 1). */
    uniform() {
      return ((this.bits() >>> 5) * 2 ** 26 + (this.bits() >>> 6) + 0.5) / 2 ** 53;
    }
    below(n) {
      return Math.floor(n * this.uniform());
    }
    /** Standard normal, by the method of Box and Muller (1958). */
    normal() {
      return Math.sqrt(-2 * Math.log(this.uniform())) * Math.cos(2 * Math.PI * this.uniform());
    }
    normals(n) {
      return Float64Array.from({length: n}, () => this.normal());
    }
    permutation(n) {
      const order = Array.from({length: n}, (_, i) => i);
      for (let i = n - 1; i > 0; i--) {
        const j = this.below(i + 1);
        [order[i], order[j]] = [order[j], order[i]];
      }
      return order;
    }
    /** The logarithm of a Gamma(shape, 1) number, by the method of Marsaglia and Tsang (2000). */
    logGamma(shape) {
      if (shape < 1) return this.logGamma(shape + 1) + Math.log(this.uniform()) / shape;
      const d = shape - 1 / 3, c = 1 / Math.sqrt(9 * d);
      for (;;) {
        const x = this.normal(), v = (1 + c * x) ** 3;
        if (v > 0 && Math.log(this.uniform()) < x * x / 2 + d * (1 - v + Math.log(v))) {
          return Math.log(d * v);
        }
      }
    }
    /** Beta(a, a): a share of two gamma numbers; 1 for a = 0. */
    beta(a) {
      return a === 0 ? 1 : 1 / (1 + Math.exp(this.logGamma(a) - this.logGamma(a)));
    }
  };

  /** Eigenvalues and eigenvectors (columns) of a small symmetric matrix, by Jacobi's rotations. */
  lib.eigen = matrix => {
    const n = matrix.length, A = matrix.map(row => [...row]);
    const V = A.map((_, i) => A.map((_, j) => (i === j ? 1 : 0)));
    for (let sweep = 0; sweep < 60; sweep++) {
      let off = 0, all = 0;
      for (let i = 0; i < n; i++) {
        for (let j = 0; j < n; j++) {
          all += A[i][j] ** 2;
          if (i !== j) off += A[i][j] ** 2;
        }
      }
      if (off <= 1e-32 * all) break;
      for (let p = 0; p < n; p++) {
        for (let q = p + 1; q < n; q++) {
          if (A[p][q] === 0) continue;
          const theta = (A[q][q] - A[p][p]) / (2 * A[p][q]);
          const t = (theta < 0 ? -1 : 1) / (Math.abs(theta) + Math.hypot(theta, 1));
          const c = 1 / Math.hypot(t, 1), s = t * c;
          for (let k = 0; k < n; k++) {
            const [x, y] = [A[k][p], A[k][q]];
            [A[k][p], A[k][q]] = [c * x - s * y, s * x + c * y];
          }
          for (let k = 0; k < n; k++) {
            const [x, y] = [A[p][k], A[q][k]];
            [A[p][k], A[q][k]] = [c * x - s * y, s * x + c * y];
            const [u, v] = [V[k][p], V[k][q]];
            [V[k][p], V[k][q]] = [c * u - s * v, s * u + c * v];
          }
        }
      }
    }
    return {values: A.map((row, i) => row[i]), vectors: V};
  };
});
