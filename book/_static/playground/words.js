/* What is happening, in a line. */
playground.define(function words(lib) {
  const digits = v => (Math.abs(v) >= 100 ? v.toFixed(0) : Number(v.toPrecision(2)).toString());
  const percent = v => `${v.toFixed(v > 0 && v < 1 ? 1 : 0)} %`;
  lib.digits = digits;

  lib.words = run => {
    if (run.stopped) return run.stopped;
    if (run.step === 0) return "Nothing is trained yet: these are the initial weights.";
    const now = run.now();
    const said = [flooding(run, now), trouble(now), edge(run, now), labels(now)].filter(Boolean);
    if (said.length < 3) said.push(testSet(run, now));
    return said.join(" ");
  };

  function flooding({side, up, atLevel, data}, now) {
    if (side.flood_level === 0) return "";
    const below = now.train_loss < side.flood_level;
    if (below && up === atLevel) return "The loss is below the flood level, from where every step climbs.";
    if (atLevel === 0) return "The loss is still above the flood level: flooding has changed nothing yet.";
    const whose = side.batch_size < data.train.n ? "The loss of a batch" : "The loss";
    return `${whose} has reached the flood level; since then the walk has stepped up ` +
      `${Math.round(100 * up / atLevel)} % of the time.`;
  }

  function trouble(now) {
    if (now.gradient < 1e-4 && now.train_loss > 0.3) {
      return "The gradient has vanished while the loss is high: a small λ max is no good sign here.";
    }
    return now.constant ? "The network gives every example the same answer." : "";
  }

  function edge({curvature}, now) {
    if (!Number.isFinite(now.edge)) return "";
    const ratio = now.largest / now.edge;
    if (ratio > 1.5) return `λ max is ${digits(ratio)} times its edge: the steps are too long for this curvature.`;
    if (ratio > 0.9) {
      return now.gradient > 0.02 ? "λ max is at its edge, and the weights swing across the valley."
        : "λ max is as large as its edge.";
    }
    const risen = curvature.largest.length > 4 && now.largest > 1.3 * Math.min(...curvature.largest);
    return ratio > 0.3 && risen ? `λ max has risen to ${digits(100 * ratio)} % of its edge.` : "";
  }

  function labels(now) {
    if (now.wrong === 0 || now.constant) return "";
    return `The network has learned ${now.learned} of the ${now.wrong} wrong labels.`;
  }

  function testSet({losses}, now) {
    const lowest = Math.min(...losses.test_loss), at = losses.step[losses.test_loss.indexOf(lowest)];
    const error = `Test error ${percent(now.test_error)}` +
      (now.test_error > now.lowest + 1 ? `, at step ${now.lowest_at} it was ${percent(now.lowest)}` : "");
    if (now.test_loss > 1.1 * lowest && now.test_loss > lowest + 0.02) {
      return `${error}. The test loss has risen by ${digits(now.test_loss - lowest)} since step ${at}.`;
    }
    return `${error}.`;
  }
});
