/* One side of the playground: a network in training, and what is read from it on the way. */
playground.define(function run(lib) {
  const {Stream, norm} = lib;
  const MOST = 1200;  // readings that are kept; beyond, every second is dropped

  const named = (...names) => Object.fromEntries(names.map(name => [name, []]));

  lib.Run = class Run {
    constructor(shared, side, data = lib.makeData(shared)) {
      this.data = data;
      this.shared = shared;
      this.model = new lib.MLP(side);
      const w = this.model.init(new Stream(shared.seed, "weights"));
      const rescaled = side.activation === "ReLU" ? this.model.rescaled(w, side.rescaling) : w;
      this.change(side);
      this.state = {w: rescaled, optimizer: this.recipe.optimizer.init(rescaled)};
      this.order = new Stream(shared.seed, "batches");
      this.draws = new Stream(shared.seed, "batch stage");
      const directions = new Stream(shared.seed, "directions");
      this.directions = [0, 1].map(() => directions.normals(this.model.length));
      this.step = 0;
      this.up = 0;          // steps that climbed, and all steps since the level was reached
      this.atLevel = 0;
      this.stopped = "";
      this.waiting = [];
      this.every = 10;      // steps between two readings of losses; those of curvature: five times
      this.losses = named("step", "train_loss", "test_loss", "train_error", "test_error", "gradient");
      this.curvature = named("step", "largest", "edge", "sharpness", "within", "between");
      this.trail = [];
      this.read();
    }

    /** Other stages from the next step on; the weights stay. */
    change(side) {
      this.side = side;
      this.recipe = lib.recipe(side);
    }

    /** The weights that are judged: the average, if there is one. */
    get weights() {
      return this.side.ema ? this.recipe.optimizer.evaluated(this.state.optimizer) : this.state.w;
    }

    objective(part = this.data.train) {
      return lib.objective(this.model, part, this.recipe.criterion);
    }

    nextBatch() {
      const {train} = this.data, size = this.side.batch_size;
      if (size >= train.n) return train;
      if (this.waiting.length < size) this.waiting = this.order.permutation(train.n);
      const rows = this.waiting.splice(0, size);
      return {
        x: Float64Array.from(rows.flatMap(i => [train.x[2 * i], train.x[2 * i + 1]])),
        y: Float64Array.from(rows, i => train.y[i]),
        n: size,
      };
    }

    advance(reading = true) {
      if (this.stopped) return;
      const batch = this.nextBatch(), draw = this.recipe.batch.draw(batch, this.draws);
      const {state, loss, ascends, shown} = lib.step(this.model, this.recipe, this.state, batch, draw);
      if (!Number.isFinite(loss) || !(norm(state.w) < 1e6)) {
        this.stopped = `Stopped at step ${this.step}: the next step would have made the weights longer ` +
          "than a million. Choose a smaller learning rate or radius, and restart.";
        return;
      }
      this.state = state;
      this.shown = shown;
      this.step += 1;
      if (ascends || this.atLevel) {
        this.atLevel += 1;
        this.up += ascends;
      }
      if (!reading) return;
      if (this.step % this.every === 0) this.read();
      if (this.step % (5 * this.every) === 0) this.readCurvature();
    }

    /** Losses, errors and the length of the gradient, now. */
    read() {
      if (this.losses.step.at(-1) === this.step) return;
      const w = this.weights, {train, test} = this.data, {criterion} = this.recipe;
      const record = (part, values) => {
        const z = this.model.logits(w, part.x, part.n);
        let loss = 0, wrong = 0;
        for (let i = 0; i < part.n; i++) {
          loss += criterion(z[i], part.y[i])[0] / part.n;
          wrong += (z[i] > 0) !== (part.y[i] === 1);
        }
        this.losses[`${values}_loss`].push(loss);
        this.losses[`${values}_error`].push(100 * wrong / part.n);
      };
      record(train, "train");
      record(test, "test");
      this.losses.gradient.push(norm(this.objective().gradient(w, true).gradient));
      this.losses.step.push(this.step);
      this.trail.push(w);
      if (this.trail.length > 400) this.trail.shift();
      if (this.losses.step.length > MOST) {
        for (const values of Object.values(this.losses)) thin(values);
        for (const values of Object.values(this.curvature)) thin(values);
        this.every *= 2;
      }
    }

    /** λ_max and where it could no longer grow, sharpness, and stiffness, now. */
    readCurvature() {
      if (this.curvature.step.at(-1) === this.step) return;
      this.read();
      const w = this.weights, objective = this.objective();
      // a little of something new, in case another direction has overtaken the last one
      const fresh = new Stream(this.step, "start").normals(w.length);
      const start = this.top ? lib.plus(this.top, fresh, 0.2 / norm(fresh)) : fresh;
      const {value, vector} = lib.largestEigenvalue(v => objective.hessianProduct(w, v, true), start);
      this.top = vector;
      const {within, between} = lib.stiffness(this.model, w, this.data.train, this.recipe.criterion);
      const {radius, scaled} = this.shared;
      const now = {
        step: this.step,
        largest: value,
        edge: this.edge(this.losses.gradient.at(-1)),
        sharpness: lib.sharpness(objective, w, {rho: radius, adaptive: scaled === "yes"}),
        within,
        between,
      };
      for (const [name, v] of Object.entries(now)) this.curvature[name].push(v);
    }

    /** The curvature h at which a swing no longer dies out, from h (1 + c h) = 2 (1 + μ) / η − decay.
        c is 0 for plain descent, λ for the gradient penalty, and ρ / ‖g‖ for SAM. */
    edge(gradient) {
      const {lr, momentum, weight_decay, rho, p, adaptive, penalty, batch_size, ema} = this.side;
      const top = 2 * (1 + momentum) / lr - weight_decay;
      if (this.side.gradient === "plain" || !Number.isFinite(top)) return top;
      if (batch_size < this.data.train.n || ema > 0) return NaN;
      if (this.side.gradient === "SAM" && (p !== 2 || adaptive === "yes")) return NaN;
      const c = this.side.gradient === "SAM" ? rho / gradient : penalty;
      return c > 0 ? (Math.sqrt(1 + 4 * c * top) - 1) / (2 * c) : top;
    }

    /** The last reading of each kind. */
    now() {
      const last = table => Object.fromEntries(Object.entries(table).map(([k, v]) => [k, v.at(-1)]));
      const {train} = this.data, z = this.model.logits(this.weights, train.x, train.n);
      let wrong = 0, learned = 0;
      train.y.forEach((y, i) => {
        if (y === train.clean[i]) return;
        wrong += 1;
        learned += (z[i] > 0) === (y === 1);
      });
      return {...last(this.curvature), ...last(this.losses), wrong, learned};
    }

    /** The probability of class 1 on a grid over the picture, from its upper left corner. */
    map(size) {
      const {reach} = this.data;
      const x = new Float64Array(2 * size * size);
      for (let i = 0; i < size * size; i++) {
        x[2 * i] = reach * (2 * ((i % size) + 0.5) / size - 1);
        x[2 * i + 1] = reach * (1 - 2 * (Math.floor(i / size) + 0.5) / size);
      }
      const z = this.model.logits(this.weights, x, size * size);
      const quadratic = this.side.loss === "quadratic";
      return Float32Array.from(z, v => (quadratic ? Math.min(1, Math.max(0, (v + 1) / 2)) : 1 / (1 + Math.exp(-v))));
    }

    /** The loss on a line or a plane through the weights, and the way that led here on that plane. */
    slice(view, {radius = 1, line = 41, plane = 23} = {}) {
      const w = this.weights, objective = this.objective();
      const d = lib.filterNormalized(this.directions[0], w, this.model);
      if (view === "line") return {radius, values: lib.lossSlice(objective, w, d, radius, line)};
      const e = lib.orthogonal(lib.filterNormalized(this.directions[1], w, this.model), d);
      const along = u => v => lib.dot(lib.plus(v, w, -1), u) / lib.dot(u, u);
      return {
        radius,
        size: plane,
        values: lib.lossPlane(objective, w, d, e, radius, plane),
        trail: [this.trail.map(along(d)), this.trail.map(along(e))],
      };
    }
  };

  function thin(values) {
    const kept = values.filter((_, i) => i % 2 === 0);
    values.splice(0, values.length, ...kept);
  }
});
