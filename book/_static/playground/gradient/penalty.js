/* The gradient of L + (λ/2)‖∇L‖², as flatmin.gradient.GradientPenalty. */
playground.define(function penalty(lib) {
  lib.GradientPenalty = ({penalty}) => (objective, w) => {
    const here = objective.gradient(w);
    const Hg = objective.hessianProduct(w, here.gradient);
    return {...here, gradient: lib.plus(here.gradient, Hg, penalty)};
  };
});
