/* The loop that trains, in a worker, so that the page stays responsive.  It sends a frame when the
   page has drawn the last one. */
playground.define(function worker(lib) {
  const SIZE = 44;  // of the map

  lib.serve = post => {
    let state, runs = [], playing = false, drawn = true, dirty = false, due = 0, timer = null;
    let counted = 0, since = 0, speed = 0;
    const slices = new Map();
    const channel = new MessageChannel();
    channel.port1.onmessage = () => loop();

    const restart = () => {
      const data = lib.makeData(state.shared);
      const sides = state.shared.sides === "2" ? [state.a, state.b] : [state.a];
      runs = sides.map(side => new lib.Run(state.shared, side, data));
      runs.forEach(run => run.readCurvature());
      slices.clear();
      playing = false;
      post({type: "data", ...data});
    };

    /** The slice of a run: anew if it stands still, or if the last one took less than a tenth of the time. */
    const slice = run => {
      const last = slices.get(run), start = performance.now();
      const key = `${run.step} ${state.shared.view}`;
      if (last && (last.key === key || (playing && last.view === state.shared.view && start < last.next))) {
        return last.values;
      }
      const values = run.slice(state.shared.view), cost = performance.now() - start;
      slices.set(run, {values, key, view: state.shared.view, next: performance.now() + 10 * cost});
      return values;
    };

    const frame = () => {
      dirty = true;
      if (!drawn) return;
      drawn = dirty = false;
      if (!playing) runs.forEach(run => run.readCurvature());
      post({
        type: "frame",
        playing,
        speed,
        sides: runs.map(run => ({
          step: run.step,
          stopped: run.stopped,
          map: run.map(SIZE),
          losses: run.losses,
          curvature: run.curvature,
          now: run.now(),
          slice: slice(run),
          shown: run.shown && run.side.transform !== "none" ? run.shown : null,
          words: lib.words(run),
        })),
      });
    };

    const pause = () => {
      playing = false;
      clearTimeout(timer);
      speed = 0;
      frame();
    };

    const once = () => {
      runs.forEach(run => run.advance());
      counted += 1;
      const end = runs.every(run => run.stopped) || runs.some(run => run.step === state.shared.pause);
      if (end) playing = false;
      return !end;
    };

    const loop = () => {
      if (!playing) return;
      const rate = Number(state.shared.speed), start = performance.now();
      if (rate) {
        once();
        if (rate <= 10) runs.forEach(run => run.read());
      } else {
        while (once() && performance.now() - start < 30);
      }
      const now = performance.now();
      if (now - since > 500) {
        speed = 1000 * counted / (now - since);
        counted = 0;
        since = now;
      }
      if (!playing) return pause();
      if (now >= due) {
        due = now + 100;
        frame();
      }
      if (rate) timer = setTimeout(loop, Math.max(0, 1000 / rate - (performance.now() - start)));
      else channel.port2.postMessage(null);
    };

    const actions = {
      restart(message) {
        clearTimeout(timer);
        state = message.state;
        restart();
        frame();
      },
      /** Other settings for the weights that are there. */
      change(message) {
        const reread = ["radius", "scaled"].some(key => state.shared[key] !== message.state.shared[key]);
        state = message.state;
        runs.forEach((run, i) => {
          run.change([state.a, state.b][i]);
          run.shared = state.shared;
          if (reread && run.curvature.step.at(-1) === run.step) {
            for (const values of Object.values(run.curvature)) values.pop();
          }
        });
        frame();
      },
      play() {
        if (playing || runs.every(run => run.stopped)) return frame();
        playing = true;
        counted = 0;
        since = performance.now();
        loop();
      },
      pause,
      step() {
        clearTimeout(timer);
        playing = false;
        once();
        frame();
      },
      drawn() {
        drawn = true;
        if (dirty) frame();
      },
    };
    post({type: "ready"});
    return ({data}) => actions[data.type](data);
  };
});
