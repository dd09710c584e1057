/* What is happening, in a line. */
playground.define(function words(lib) {
  const digits = v => (Math.abs(v) >= 100 ? v.toFixed(0) : Number(v.toPrecision(2)).toString());
  lib.digits = digits;

  lib.words = run => {
    const now = run.now(), {side, losses, curvature} = run, said = [];
    if (run.stopped) return run.stopped;
    if (run.step === 0) return "Nothing is trained yet: these are the initial weights.";

    if (side.flood_level > 0 && run.atLevel >= 10) {
      const share = Math.round(100 * run.up / run.atLevel);
      said.push(`The loss has reached the flood level; since then the walk has stepped up ${share} % of the time.`);
    } else if (side.flood_level > 0) {
      said.push("The loss is still above the flood level: flooding has changed nothing yet.");
    }

    const watched = side.flood_level === 0 && side.transform === "none" && side.batch_size >= run.data.train.n;
    if (watched && Number.isFinite(now.edge) && now.largest > 0) {
      const ratio = now.largest / now.edge;
      if (ratio > 1.5) said.push(`λ max is ${digits(ratio)} times its edge: the steps are too long for this curvature.`);
      else if (ratio > 0.9) said.push("λ max is at its edge: the weights swing from wall to wall of the valley.");
      else if (ratio > 0.3 && curvature.largest.length > 4 && now.largest > 1.3 * Math.min(...curvature.largest)) {
        said.push(`λ max has risen to ${digits(100 * ratio)} % of its edge.`);
      }
    }

    if (now.wrong > 0) said.push(`The network gives ${now.learned} of the ${now.wrong} wrong labels back.`);
    const lowest = Math.min(...losses.test_loss), at = losses.step[losses.test_loss.indexOf(lowest)];
    if (now.test_loss > 1.1 * lowest && now.test_loss > lowest + 0.02) {
      said.push(`The test loss was lowest at step ${at}; since then it has risen by ${digits(now.test_loss - lowest)}.`);
    } else if (said.length < 2) {
      const error = v => `${v.toFixed(v > 0 && v < 1 ? 1 : 0)} %`;
      said.push(`Training error ${error(now.train_error)}, test error ${error(now.test_error)}.`);
    }
    return said.join(" ");
  };
});
