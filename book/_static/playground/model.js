/* A multilayer perceptron with one logit z, which is positive for class 1.  Its weights are one
   vector: weight and bias of each layer in turn, as PyTorch orders them. */
playground.define(function model(lib) {
  /** ℓ(z, y), its first and second derivative by z.  Targets y are probabilities of class 1. */
  lib.LOSSES = {
    "cross-entropy": (z, y) => {
      const e = Math.exp(-Math.abs(z)), p = (z > 0 ? 1 : e) / (1 + e);
      return [Math.max(z, 0) - y * z + Math.log1p(e), p - y, e / (1 + e) ** 2];
    },
    quadratic: (z, y) => [(z - (2 * y - 1)) ** 2 / 2, z - (2 * y - 1), 1],
  };

  /** The activation φ, and φ' and φ'' from the activation a. */
  const ACTIVATIONS = {
    tanh: [Math.tanh, a => 1 - a * a, a => -2 * a * (1 - a * a)],
    ReLU: [z => (z > 0 ? z : 0), a => (a > 0 ? 1 : 0), () => 0],
  };

  lib.MLP = class MLP {
    constructor({layers, width, activation}) {
      this.sizes = [2, ...Array(layers).fill(width), 1];
      [this.phi, this.dphi, this.d2phi] = ACTIVATIONS[activation];
      this.layers = [];
      this.length = 0;
      for (let l = 0; l + 1 < this.sizes.length; l++) {
        const [inputs, outputs] = [this.sizes[l], this.sizes[l + 1]];
        const weight = this.length, bias = weight + inputs * outputs;
        this.layers.push({inputs, outputs, weight, bias});
        this.length = bias + outputs;
      }
    }

    /** PyTorch's initial weights, uniform in ±1/√inputs; a model without hidden layers starts at 0. */
    init(random) {
      const w = new Float64Array(this.length);
      if (this.layers.length === 1) return w;
      for (const {inputs, outputs, weight} of this.layers) {
        for (let i = weight; i < weight + (inputs + 1) * outputs; i++) {
          w[i] = (2 * random.uniform() - 1) / Math.sqrt(inputs);
        }
      }
      return w;
    }

    /** The same function with ReLU: the first layer times `factor`, the second's weights by it. */
    rescaled(w, factor) {
      const [first, second] = this.layers;
      if (!second) return w;
      return w.map((v, i) => (i < second.weight ? v * factor : i < second.bias ? v / factor : v));
    }

    /** Room for the values of n examples in each layer. */
    room(n) {
      this.rooms ??= new Map();
      if (!this.rooms.has(n)) {
        if (this.rooms.size > 8) this.rooms.clear();
        const make = () => this.sizes.map(size => new Float64Array(n * size));
        this.rooms.set(n, {a: make(), da: make(), Ra: make(), Rda: make()});
      }
      return this.rooms.get(n);
    }

    /** out = input · weightᵀ + bias of one layer; `add`: on top of what is there, without a bias. */
    affine(layer, w, input, out, n, add = false) {
      const {inputs, outputs, weight, bias} = layer;
      for (let i = 0; i < n; i++) {
        for (let o = 0; o < outputs; o++) {
          let sum = add ? out[i * outputs + o] : w[bias + o];
          for (let k = 0, r = weight + o * inputs, s = i * inputs; k < inputs; k++) {
            sum += w[r + k] * input[s + k];
          }
          out[i * outputs + o] = sum;
        }
      }
    }

    /** The activations of all layers; those of the last are the logits [n]. */
    forward(w, x, n) {
      const {a} = this.room(n), {phi} = this;
      a[0] = x;
      this.layers.forEach((layer, l) => {
        const out = a[l + 1];
        this.affine(layer, w, a[l], out, n);
        if (l + 1 < this.layers.length) for (let i = 0; i < out.length; i++) out[i] = phi(out[i]);
      });
      return a;
    }

    logits(w, x, n) {
      return this.forward(w, x, n)[this.layers.length];
    }

    /** Adds δᵀ · input to a layer's part of a gradient, and its sum to the bias. */
    collect(layer, delta, input, n, gradient, withBias = true) {
      const {inputs, outputs, weight, bias} = layer;
      for (let i = 0; i < n; i++) {
        for (let o = 0; o < outputs; o++) {
          const d = delta[i * outputs + o];
          if (withBias) gradient[bias + o] += d;
          for (let k = 0, r = weight + o * inputs, s = i * inputs; k < inputs; k++) {
            gradient[r + k] += d * input[s + k];
          }
        }
      }
    }

    /** δ · weight: the derivative by a layer's input; `add`: on top of what is there. */
    back(layer, w, delta, out, n, add = false) {
      const {inputs, outputs, weight} = layer;
      if (!add) out.fill(0);
      for (let i = 0; i < n; i++) {
        for (let o = 0; o < outputs; o++) {
          const d = delta[i * outputs + o];
          for (let k = 0, r = weight + o * inputs, s = i * inputs; k < inputs; k++) {
            out[s + k] += d * w[r + k];
          }
        }
      }
    }

    /** The mean loss. */
    loss(w, {x, y, n}, criterion) {
      const z = this.logits(w, x, n);
      let sum = 0;
      for (let i = 0; i < n; i++) sum += criterion(z[i], y[i])[0];
      return sum / n;
    }

    /** The mean loss and its gradient, by backpropagation. */
    gradient(w, {x, y, n}, criterion) {
      const a = this.forward(w, x, n), {da} = this.room(n), last = this.layers.length;
      const gradient = new Float64Array(this.length);
      let loss = 0;
      for (let i = 0; i < n; i++) {
        const [value, slope] = criterion(a[last][i], y[i]);
        loss += value / n;
        da[last][i] = slope / n;
      }
      for (let l = last - 1; l >= 0; l--) {
        this.collect(this.layers[l], da[l + 1], a[l], n, gradient);
        if (l === 0) break;
        this.back(this.layers[l], w, da[l + 1], da[l], n);
        for (let i = 0; i < da[l].length; i++) da[l][i] *= this.dphi(a[l][i]);
      }
      return {loss, gradient};
    }

    /** Hv, exactly: the derivative of the gradient along v (Pearlmutter 1994).  R of a quantity is
        its derivative along v; each line of `gradient` has its own. */
    hessianProduct(w, v, {x, y, n}, criterion) {
      const a = this.forward(w, x, n), {da, Ra, Rda} = this.room(n), last = this.layers.length;
      const product = new Float64Array(this.length);
      Ra[0].fill(0);
      this.layers.forEach((layer, l) => {
        this.affine(layer, v, a[l], Ra[l + 1], n);
        if (l > 0) this.affine(layer, w, Ra[l], Ra[l + 1], n, true);
        if (l + 1 === last) return;
        for (let i = 0; i < Ra[l + 1].length; i++) Ra[l + 1][i] *= this.dphi(a[l + 1][i]);
      });
      for (let i = 0; i < n; i++) {
        const [, slope, curvature] = criterion(a[last][i], y[i]);
        da[last][i] = slope / n;
        Rda[last][i] = curvature * Ra[last][i] / n;
      }
      for (let l = last - 1; l >= 0; l--) {
        this.collect(this.layers[l], Rda[l + 1], a[l], n, product);
        if (l === 0) break;
        this.collect(this.layers[l], da[l + 1], Ra[l], n, product, false);
        this.back(this.layers[l], w, da[l + 1], da[l], n);
        this.back(this.layers[l], w, Rda[l + 1], Rda[l], n);
        this.back(this.layers[l], v, da[l + 1], Rda[l], n, true);
        for (let i = 0; i < da[l].length; i++) {
          const slope = this.dphi(a[l][i]);
          // φ''(z) R{z} = φ''(z) / φ'(z) · R{a}; a saturated unit has φ' = 0 and R{a} = 0
          const bend = slope === 0 ? 0 : this.d2phi(a[l][i]) / slope * Ra[l][i];
          Rda[l][i] = Rda[l][i] * slope + da[l][i] * bend;
          da[l][i] *= slope;
        }
      }
      return product;
    }
  };
});
