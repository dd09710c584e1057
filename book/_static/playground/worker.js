/* The loop that trains, in a worker, so that the page stays responsive.  It sends a frame when the
   page has drawn the last one. */
playground.define(function worker(lib) {
  const SIZE = 44;  // of the map

  lib.serve = post => {
    let state, runs = [], playing = false, drawn = true, dirty = false;
    let turn = 0;   // counts the orders of the page; a loop of an earlier turn ends
    let due = 0, counted = 0, since = 0, speed = 0, last = 0, owed = 0;
    const slices = new Map();
    const channel = new MessageChannel();
    channel.port1.onmessage = ({data}) => loop(data);

    const restart = () => {
      const data = lib.makeData(state.shared);
      const sides = state.shared.sides === "2" ? [state.a, state.b] : [state.a];
      runs = sides.map(side => new lib.Run(state.shared, side, data));
      runs.forEach(run => run.readCurvature());
      slices.clear();
      post({type: "data", ...data});
    };

    /** The slice of a run.  While it plays: anew if the last one took less than a tenth of the time. */
    const slice = run => {
      const last = slices.get(run), start = performance.now(), {view} = state.shared;
      if (playing && last?.view === view && start < last.next) return last.values;
      const values = run.slice(view), end = performance.now();
      slices.set(run, {values, view, next: end + 10 * (end - start)});
      return values;
    };

    const frame = () => {
      dirty = true;
      if (!drawn) return;
      drawn = dirty = false;
      if (!playing) runs.forEach(run => run.readCurvature());
      post({
        type: "frame",
        turn,
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
      speed = 0;
      frame();
    };

    /** One step of all runs; false if there is none after it. */
    const once = () => {
      runs.forEach(run => run.advance());
      counted += 1;
      return runs.some(run => !run.stopped) && runs.every(run => run.step !== state.shared.pause);
    };

    const loop = mine => {
      if (!playing || mine !== turn) return;
      const rate = Number(state.shared.speed) || Infinity, start = performance.now();
      owed = rate === Infinity ? rate : Math.min(owed + rate * (start - last) / 1000, rate);
      last = start;
      let more = true;
      for (; more && owed >= 1 && performance.now() - start < 30; owed -= 1) more = once();
      if (rate <= 10) runs.forEach(run => run.read());
      if (!more) return pause();
      const now = performance.now();
      if (now - since > 500) {
        speed = 1000 * counted / (now - since);
        counted = 0;
        since = now;
      }
      if (now >= due) {
        due = now + 100;
        frame();
      }
      if (rate < Infinity) setTimeout(loop, Math.min(40, 1000 / rate), mine);
      else channel.port2.postMessage(mine);
    };

    const actions = {
      restart() {
        restart();
        pause();
      },
      /** Other settings for the weights that are there. */
      change() {
        runs.forEach((run, i) => run.change([state.a, state.b][i], state.shared));
        slices.clear();
        frame();
      },
      play() {
        playing = runs.some(run => !run.stopped);
        counted = 0;
        since = last = performance.now();
        owed = 1;
        if (playing) loop(turn);
        else frame();
      },
      pause,
      step() {
        once();
        pause();
      },
      drawn() {
        drawn = true;
        if (dirty) frame();
      },
    };
    post({type: "ready"});
    return ({data}) => {
      turn = data.turn ?? turn;
      state = data.state ?? state;
      actions[data.type]();
    };
  };
});
