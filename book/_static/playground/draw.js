/* Pictures on canvases, in the colours of the page's theme. */
playground.draw = (() => {
  const LIGHT = {sides: ["#0072b2", "#c04a00"], classes: ["#007a5a", "#a8478a"], paper: "#ffffff"};
  const DARK = {sides: ["#56b4e9", "#f0a03c"], classes: ["#2fc79b", "#e08cc4"], paper: "#121212"};

  const palette = () => {
    const style = getComputedStyle(document.body);
    const dark = document.documentElement.dataset.theme === "dark";
    return {...(dark ? DARK : LIGHT), text: style.color, font: `12px ${style.fontFamily}`};
  };
  const rgb = hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16));
  const blend = (a, b, share) => a.map((v, i) => v + (b[i] - v) * share);
  const css = ([r, g, b], alpha = 1) => `rgba(${Math.round(r)}, ${Math.round(g)}, ${Math.round(b)}, ${alpha})`;

  /** A context in CSS pixels on a canvas that is as sharp as the screen. */
  const prepare = canvas => {
    const {clientWidth: width, clientHeight: height} = canvas, scale = devicePixelRatio || 1;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const ctx = canvas.getContext("2d"), colors = palette();
    ctx.scale(scale, scale);
    ctx.font = colors.font;
    return {ctx, width, height, colors};
  };

  const point = (ctx, x, y, label, size) => {
    ctx.beginPath();
    if (label) ctx.rect(x - size * 0.9, y - size * 0.9, 1.8 * size, 1.8 * size);
    else ctx.arc(x, y, size, 0, 2 * Math.PI);
  };

  /** What the network says everywhere, and the examples. */
  const map = (canvas, side, {train, test, reach}) => {
    const {ctx, width, height, colors} = prepare(canvas), size = Math.sqrt(side.map.length);
    const [zero, one, paper] = [...colors.classes, colors.paper].map(rgb);
    const image = new ImageData(size, size);
    side.map.forEach((p, i) => {
      const color = blend(paper, p > 0.5 ? one : zero, 0.12 + 0.6 * Math.abs(2 * p - 1));
      image.data.set([...color, 255], 4 * i);
    });
    const small = new OffscreenCanvas(size, size);
    small.getContext("2d").putImageData(image, 0, 0);
    ctx.imageSmoothingEnabled = true;
    ctx.drawImage(small, 0, 0, width, height);

    const X = x => width * (x / reach + 1) / 2, Y = y => height * (1 - y / reach) / 2;
    for (let i = 0; i < Math.min(test.n, 250); i++) {
      ctx.fillStyle = css(test.y[i] ? one : zero, 0.75);
      ctx.fillRect(X(test.x[2 * i]) - 1, Y(test.x[2 * i + 1]) - 1, 2, 2);
    }
    if (side.shown) {
      const {x, y, n} = side.shown;
      for (let i = 0; i < n; i++) {
        ctx.save();
        ctx.translate(X(x[2 * i]), Y(x[2 * i + 1]));
        ctx.rotate(Math.PI / 4);
        ctx.fillStyle = css(blend(zero, one, y[i]));
        ctx.strokeStyle = colors.paper;
        ctx.fillRect(-2.5, -2.5, 5, 5);
        ctx.strokeRect(-2.5, -2.5, 5, 5);
        ctx.restore();
      }
    }
    for (let i = 0; i < train.n; i++) {
      const wrong = train.y[i] !== train.clean[i];
      point(ctx, X(train.x[2 * i]), Y(train.x[2 * i + 1]), train.y[i], 3.5);
      ctx.fillStyle = css(train.y[i] ? one : zero);
      ctx.fill();
      ctx.lineWidth = wrong ? 2 : 1;
      ctx.strokeStyle = wrong ? colors.text : colors.paper;
      ctx.stroke();
    }
  };

  const niceStep = (range, about) => {
    const rough = range / about, power = 10 ** Math.floor(Math.log10(rough));
    return [1, 2, 5, 10].map(m => m * power).find(step => step >= rough);
  };

  const ticks = (low, high, log, about = 4) => {
    if (log) {
      const marks = high - low > 1.5 ? [1] : high - low > 0.5 ? [1, 2, 5] : [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8];
      const all = [];
      for (let power = Math.floor(low); power <= high; power++) {
        all.push(...marks.map(mark => power + Math.log10(mark)).filter(t => t >= low - 1e-9 && t <= high + 1e-9));
      }
      const every = Math.ceil(all.length / 6);
      return all.filter((_, i) => i % every === 0);
    }
    const step = niceStep(high - low, about), first = Math.ceil(low / step - 1e-9);
    return Array.from({length: Math.floor(high / step + 1e-9) - first + 1}, (_, i) => (first + i) * step);
  };

  const short = v => {
    if (v >= 1e6) return v.toExponential(0);
    return v >= 1e4 ? `${Number((v / 1000).toPrecision(3))}k` : String(Number(v.toPrecision(6)));
  };
  const power = t => (t > -3.5 && t < 4.5 ? String(Number((10 ** t).toPrecision(2))) : (10 ** t).toExponential(0));

  /** Lines over one axis.  lines: {x, y, side, dash}; levels: {value, side} drawn as water. */
  const chart = (canvas, {
    lines, levels = [], log = false, low, high, xlow, xhigh, xlabel = "step", mark, names = [],
  }) => {
    const {ctx, width, height, colors} = prepare(canvas);
    const L = 44, R = 18, T = 8, B = 34;
    const scale = v => (log ? Math.log10(v) : v);
    const shown = lines.flatMap(({y}) => y.map(scale)).filter(Number.isFinite).sort((a, b) => a - b);
    if (shown.length === 0) return;
    const at = share => shown[Math.min(shown.length - 1, Math.floor(share * shown.length))];
    let bottom = low ?? (log ? at(0.01) - 0.1 : at(0)), top = high ?? (log ? at(0.995) + 0.1 : 1.08 * at(0.985));
    for (const {value} of levels) top = Math.max(top, scale(value) * (log ? 1 : 1.3));
    const ends = lines.map(({y}) => scale(y.at(-1))).filter(Number.isFinite);
    if (high === undefined) top = Math.max(top, ...ends.map(v => (log ? v + 0.05 : 1.03 * v)));
    if (!(top > bottom)) top = bottom + 1;
    const xs = lines.flatMap(({x}) => [x[0], x.at(-1)]);
    const left = xlow ?? 0, right = xhigh ?? Math.max(10, ...xs);
    const X = v => L + (v - left) / (right - left) * (width - L - R);
    const Y = v => height - B - (v - bottom) / (top - bottom) * (height - T - B);

    ctx.lineWidth = 1;
    ctx.textBaseline = "middle";
    for (const t of ticks(bottom, top, log)) {
      ctx.globalAlpha = 0.15;
      ctx.strokeStyle = colors.text;
      ctx.beginPath();
      ctx.moveTo(L, Y(t));
      ctx.lineTo(width - R, Y(t));
      ctx.stroke();
      ctx.globalAlpha = 1;
      ctx.fillStyle = colors.text;
      ctx.textAlign = "right";
      ctx.fillText(log ? power(t) : short(t), L - 5, Y(t));
    }
    ctx.textAlign = "center";
    for (const t of ticks(left, right, false, width < 220 ? 2 : 4)) ctx.fillText(short(t), X(t), height - B + 12);
    ctx.fillText(xlabel, (L + width - R) / 2, height - 8);

    ctx.save();
    ctx.beginPath();
    ctx.rect(L, T, width - L - R, height - T - B);
    ctx.clip();
    for (const {value, side} of levels) {
      ctx.fillStyle = ctx.strokeStyle = colors.sides[side];
      ctx.globalAlpha = 0.16;
      ctx.fillRect(L, Y(scale(value)), width - L - R, height);
      ctx.globalAlpha = 1;
      ctx.setLineDash([2, 3]);
      ctx.strokeRect(L - 5, Y(scale(value)), width + 5, height);
    }
    if (mark !== undefined) {
      ctx.setLineDash([]);
      ctx.globalAlpha = 0.3;
      ctx.strokeStyle = colors.text;
      ctx.strokeRect(X(mark), -5, width, height + 10);
      ctx.globalAlpha = 1;
    }
    for (const {x, y, side, dash} of lines) {
      ctx.setLineDash({dashed: [6, 4], dotted: [2, 3]}[dash] ?? []);
      ctx.strokeStyle = colors.sides[side];
      ctx.lineWidth = dash === "dotted" ? 1.5 : side === 0 ? 3 : 1.6;  // B does not hide A beneath it
      ctx.beginPath();
      let pen = false;
      y.forEach((v, i) => {
        const s = scale(v);
        if (!Number.isFinite(s)) return void (pen = false);
        ctx[pen ? "lineTo" : "moveTo"](X(x[i]), Y(Math.max(bottom - 9, Math.min(s, top + (top - bottom)))));
        pen = true;
      });
      if (y.length === 1 && pen) ctx.lineTo(X(x[0]) + 4, Y(scale(y[0])));  // before the first step
      ctx.stroke();
    }
    ctx.restore();
    if (names.length < 2) return;
    const last = names.map((name, i) => lines.find(line => line.side === i && !line.dash)?.y.at(-1));
    let places = last.map(v => Math.max(T + 6, Math.min(height - B - 6, Y(scale(v)))));
    if (Math.abs(places[0] - places[1]) < 12) {
      const [middle, sign] = [(places[0] + places[1]) / 2, places[0] <= places[1] ? 6 : -6];
      places = [middle - sign, middle + sign];
    }
    ctx.textAlign = "left";
    names.forEach((name, i) => {
      if (!Number.isFinite(places[i])) return;
      ctx.fillStyle = colors.sides[i];
      ctx.fillText(name, width - R + 4, places[i]);
    });
  };

  /** The loss on a line through the weights, which are at 0; `high` is the same for both sides. */
  const line = (canvas, {radius, values, linear}, side, levels, high) => chart(canvas, {
    lines: [{x: Array.from(values, (_, i) => radius * (2 * i / (values.length - 1) - 1)), y: [...values], side}],
    levels, low: 0, high, xlow: -radius, xhigh: radius, mark: 0, xlabel: linear ? "first weight" : "filter lengths",
  });

  /** The loss on a plane through the weights: bands of equal loss, the water, and the way. */
  const plane = (canvas, {size, radius, values, trail}, side, level) => {
    const {ctx, width, height, colors} = prepare(canvas);
    const sorted = [...values].sort((a, b) => a - b), [paper, own] = [colors.paper, colors.sides[side]].map(rgb);
    const N = 120, image = new ImageData(N, N), lowest = sorted[0], high = sorted[Math.floor(0.95 * sorted.length)];
    const water = [38, 139, 210];
    for (let i = 0; i < N * N; i++) {
      const x = (i % N) / (N - 1) * (size - 1), y = (1 - Math.floor(i / N) / (N - 1)) * (size - 1);
      const [c, r] = [Math.min(size - 2, Math.floor(x)), Math.min(size - 2, Math.floor(y))], [u, v] = [x - c, y - r];
      const f = k => values[k] * (1 - u) + values[k + 1] * u;
      const loss = f(r * size + c) * (1 - v) + f((r + 1) * size + c) * v;
      const band = Math.floor(12 * Math.min(1, (loss - lowest) / (high - lowest || 1)));
      const color = loss < level ? water : blend(own, paper, 0.15 + 0.8 * band / 12);
      image.data.set([...color, 255], 4 * i);
    }
    const small = new OffscreenCanvas(N, N);
    small.getContext("2d").putImageData(image, 0, 0);
    ctx.drawImage(small, 0, 0, width, height);
    const X = a => width * (a / radius + 1) / 2, Y = b => height * (1 - b / radius) / 2;
    ctx.strokeStyle = ctx.fillStyle = colors.text;
    ctx.globalAlpha = 0.75;
    ctx.beginPath();
    trail[0].forEach((a, i) => ctx[i ? "lineTo" : "moveTo"](X(a), Y(trail[1][i])));
    ctx.stroke();
    point(ctx, X(trail[0][0]), Y(trail[1][0]), 0, 4);
    ctx.stroke();
    ctx.globalAlpha = 1;
    point(ctx, X(0), Y(0), 0, 4.5);
    ctx.fill();
  };

  return {map, chart, line, plane};
})();
