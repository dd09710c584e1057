/* Two classes in the plane.  x is [x1, y1, x2, y2, …], y is 0 or 1. */
playground.define(function data(lib) {
  const {Stream} = lib;
  const noisy = (random, x, y, noise) => [x + noise * random.normal(), y + noise * random.normal()];

  /** Each draws one example of a class.  `reach`: its picture shows the square |x1|, |x2| ≤ reach. */
  lib.DATA_SETS = {
    moons: {
      name: "two moons",
      reach: 3.2,
      draw(random) {
        const label = random.below(2), angle = Math.PI * random.uniform();
        const [x, y] = [Math.cos(angle), Math.sin(angle)];
        const point = label ? [1 - x, 0.5 - y] : [x, y];
        return [noisy(random, 1.5 * (point[0] - 0.5), 1.8 * (point[1] - 0.25), 0.3), label];
      },
    },
    circles: {
      name: "two circles",
      reach: 3,
      draw(random) {
        const label = random.below(2), angle = 2 * Math.PI * random.uniform(), r = label ? 0.8 : 2;
        return [noisy(random, r * Math.cos(angle), r * Math.sin(angle), 0.3), label];
      },
    },
    spiral: {
      name: "two spirals",  // of the flooding paper, at another noise and a seventh of the size
      reach: 2.4,
      draw(random) {
        const label = random.below(2), angle = 3.5 * Math.PI * random.uniform();
        const r = (angle + Math.PI * label) / 7;
        return [noisy(random, r * Math.cos(angle), r * Math.sin(angle), 0.06), label];
      },
    },
    sinusoid: {
      name: "sinusoid",  // of the flooding paper: uniform on a disc, split by a wave
      reach: 2.2,
      draw(random) {
        const v = random.normals(4), length = lib.norm(v);
        const [x, y] = [2 * v[2] / length, 2 * v[3] / length];
        return [[x, y], Number(1.5 * x + Math.sin(1.5 * y) > 0)];
      },
    },
    gaussians: {
      name: "two Gaussians",
      reach: 4,
      draw(random) {
        const label = random.below(2);
        return [noisy(random, label ? 1.5 : -1.5, 0, 0.9), label];
      },
    },
  };

  const examples = (set, n, random) => {
    const x = new Float64Array(2 * n), y = new Float64Array(n);
    for (let i = 0; i < n; i++) {
      const [point, label] = lib.DATA_SETS[set].draw(random);
      x.set(point, 2 * i);
      y[i] = label;
    }
    return {x, y, n};
  };

  /** Training and test examples.  round(noise · n) training labels are wrong; test labels are right. */
  lib.makeData = ({data, n, noise, seed}, testSize = 1000) => {
    const train = examples(data, n, new Stream(seed, "inputs"));
    train.clean = train.y.slice();
    const order = new Stream(seed, "labels").permutation(n);
    for (const i of order.slice(0, Math.round(noise * n))) train.y[i] = 1 - train.y[i];
    const test = examples(data, testSize, new Stream(seed, "test inputs"));
    return {train, test, reach: lib.DATA_SETS[data].reach};
  };
});
