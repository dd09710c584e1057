/* One side of the playground: a network in training, and what is read from it on the way. */
playground.define(function run(lib) {
  const {Stream, norm} = lib;
  const MOST = 1200;  // readings that are kept; beyond, those between the regular ones are dropped

  const named = (...names) => Object.fromEntries(names.map(name => [name, []]));

  lib.Run = class Run {
    constructor(shared, side, data = lib.makeData(shared)) {
      this.data = data;
      this.shared = shared;
      this.model = new lib.MLP(side);
      const w = this.model.init(new Stream(shared.seed, "weights"));
      const rescaled = side.activation === "ReLU" ? this.model.rescaled(w, side.rescaling) : w;
      this.side = side;
      this.recipe = lib.recipe(side);
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
      this.trail = [];
      this.forget();
      this.read();
    }

    /** No readings yet. */
    forget() {
      this.every = 10;      // steps between two readings of losses; those of curvature: five times
      this.losses = named("step", "train_loss", "test_loss", "train_error", "test_error", "gradient");
      this.curvature = named("step", "largest", "edge", "sharpness", "within", "between");
    }

    /** Other stages from the next step on; the weights stay.  If what is measured has changed, its
        curves begin anew, so that no curve shows two quantities. */
    change(side, shared = this.shared) {
      const other = (now, before, ...keys) => keys.some(key => now[key] !== before[key]);
      if (other(side, this.side, "flood_level")) this.up = this.atLevel = 0;
      const measured = other(side, this.side, "loss", "ema") || other(shared, this.shared, "radius", "scaled");
      this.side = side;
      this.shared = shared;
      this.recipe = lib.recipe(side);
      this.stopped = "";
      if (measured) this.forget();
      else if (this.curvature.step.at(-1) === this.step) {
        for (const values of Object.values(this.curvature)) values.pop();  // its edge may be another
      }
      this.readCurvature();
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
      const length = norm(state.w);
      if (!Number.isFinite(loss) || !(length < 1e6)) {
        const why = length >= 1e6 ? "would have made the weights longer than a million"
          : "cannot be computed: its loss or gradient is no number";
        this.stopped = `Stopped at step ${this.step}: the next step ${why}. ` +
          "Choose a smaller learning rate or radius, and restart.";
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
        thin(this.losses, this.every);
        thin(this.curvature, 5 * this.every);
        if (this.losses.step.length > MOST / 2) this.every *= 2;
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
        c is 0 for plain descent, λ for the gradient penalty, and ρ / ‖g‖ for SAM.  NaN where we know
        none: for batches, mixtures, an average of weights, flooding, other balls. */
    edge(gradient) {
      const {batch_size, transform, flood_level, ema} = this.side;
      if (batch_size < this.data.train.n || transform !== "none" || ema > 0 || flood_level > 0) return NaN;
      const {lr, momentum, weight_decay, rho, p, adaptive, penalty} = this.side;
      const sam = this.side.gradient === "SAM";
      if (sam && (p !== 2 || adaptive === "yes")) return NaN;
      const top = 2 * (1 + momentum) / lr - weight_decay;
      if (!(top > 0)) return NaN;
      const c = {plain: 0, SAM: rho / gradient, penalty}[this.side.gradient];
      if (c === 0 || top === Infinity) return top;
      return 2 * top / (1 + Math.sqrt(1 + 4 * c * top));
    }

    /** The last reading of each kind. */
    now() {
      const last = table => Object.fromEntries(Object.entries(table).map(([k, v]) => [k, v.at(-1)]));
      const {train} = this.data, z = this.model.logits(this.weights, train.x, train.n);
      let wrong = 0, learned = 0, positive = 0;
      train.y.forEach((y, i) => {
        positive += z[i] > 0;
        if (y === train.clean[i]) return;
        wrong += 1;
        learned += (z[i] > 0) === (y === 1);
      });
      const errors = this.losses.test_error, lowest = Math.min(...errors);
      return {
        ...last(this.curvature), ...last(this.losses), wrong, learned,
        constant: train.n > 1 && (positive === 0 || positive === train.n),
        lowest, lowest_at: this.losses.step[errors.indexOf(lowest)],
      };
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

    /** The loss on a line or a plane through the weights, and the way that led here on that plane,
        which is wide enough for it.  The plane of a model without hidden layers is that of its weights. */
    slice(view, {line = 41, plane = 23} = {}) {
      const w = this.weights, objective = this.objective(), linear = this.model.layers.length === 1;
      const [d, other] = this.directions.map((direction, k) =>
        linear ? w.map((_, i) => Number(i === k)) : lib.filterNormalized(direction, w, this.model));
      if (view === "line") return {radius: 1, linear, values: lib.lossSlice(objective, w, d, 1, line)};
      const e = lib.orthogonal(other, d);
      const along = u => this.trail.map(v => lib.dot(lib.plus(v, w, -1), u) / lib.dot(u, u));
      const trail = [along(d), along(e)];
      const radius = Math.min(3, Math.max(linear ? 1.5 : 1, ...trail.flat().map(v => 1.3 * Math.abs(v))));
      return {radius, size: plane, linear, values: lib.lossPlane(objective, w, d, e, radius, plane), trail};
    }
  };

  /** Keeps the last reading, and those at multiples of `every`. */
  function thin(table, every) {
    const kept = table.step.map((step, i) => step % every === 0 || i === table.step.length - 1);
    for (const name of Object.keys(table)) table[name] = table[name].filter((_, i) => kept[i]);
  }
});
