r"""SAM as an optimizer: for a training loop of your own.

The perturbation is that of :mod:`flatmin.gradient.sam`, which derives it; what stands around it here
keeps the weights safe, whatever happens in the second pass.
"""

import math
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._ball import check_ball, perturbation, total_of

__all__ = ["SAM"]

P = ParamSpec("P")
T = TypeVar("T")
Layout = Any  # of a sharded tensor: its mesh and placements; None: not sharded
RandomState = dict[Any, Tensor]  # by device (None: the CPU), or by module and name of a buffer


# -------------------------------------------------------------------------------------- the kernel


# ------------------------------------------------------------------------------- the gradient place


# ------------------------------------------------------------------------------------ the optimizer


def _eager(method: Callable[P, T]) -> Callable[P, T]:
    """Not traced by ``torch.compile``: what is worth it is the model, and the base's step."""
    disabled: Callable[P, T] | None = None

    @wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal disabled
        if disabled is None:  # importing the compiler takes its time, and every optimizer does it
            disabled = torch.compiler.disable(method)
        return disabled(*args, **kwargs)

    return run


class SAM(torch.optim.Optimizer):
    r"""SAM around any optimizer: two passes a step, and the base optimizer takes the step.

    .. math:: w \leftarrow \operatorname{base}\big(w,\ \nabla L(w+\hat\epsilon)\big)

    Parameters
    ----------
    base_optimizer : Optimizer
        Any instance.  Its ``param_groups`` and ``state`` are shared, so that schedulers may be
        given either, and checkpoints are those of the base optimizer.
    rho : float
        The radius :math:`\rho\ge0`.
    p : float
        Which norm, in [1, ∞].
    adaptive : bool
        The neighbourhood scales with the weights, :math:`T=|w|+\eta` (ASAM).
    eta : float
        :math:`\eta\ge0` of the adaptive form.
    model : Module, optional
        The network (as it is called: the ``DistributedDataParallel`` wrapper, where there is one).
        If it is given, its buffers, such as BatchNorm's statistics, are updated by the first pass
        alone, and in the two-phase use too, the second pass repeats the first one's random numbers.
    per_rank : bool
        Under ``DistributedDataParallel``: every process climbs its own part of the batch (m-SAM, as
        in the paper), and one of two all-reduces is saved.  ``step(closure)`` sees to it by
        ``model.no_sync()``; in the two-phase use put the first pass under it yourself.  ``False``:
        all climb the gradient of the whole batch.

    Attributes
    ----------
    base_optimizer : Optimizer
    skipped : int
        How many steps were skipped because a gradient was infinite or NaN.

    Notes
    -----
    *Groups.* ``rho``, ``p``, ``adaptive`` and ``eta`` may stand in a parameter group, as ``lr``
    may.  All groups with one p share one ball, :math:`\|T^{-1}\epsilon\|_p\le1` with
    :math:`T=\rho\,(|w|+\eta)` or :math:`T=\rho` in the terms of each group: splitting a group in
    two changes nothing, and ``rho=0`` leaves a group where it is (biases, say).  The original ASAM
    code takes biases as not adaptive: give them a group with ``adaptive=False``.

    *What is decided by the base optimizer.*  Weight decay: if it is part of ``base_optimizer``,
    it is outside of the maximum, and no part of :math:`\hat\epsilon`.  A zero gradient: then
    :math:`\hat\epsilon=0`, and the base takes the step that it takes at a zero gradient.

    *What is skipped.*  If a gradient is infinite or NaN in either pass, no step is taken, and the
    weights and the base's state are bitwise what they were.

    *Clipping* in the closure works: clipping the first gradient does not change
    :math:`\hat\epsilon`.  So does a scaled loss.

    *Cost.*  Two forward–backward passes; memory for one copy of the weights, from which they
    are restored bitwise whatever happens in the second pass.  (With p≠2, with ``adaptive``, or with
    groups of different ``rho``, temporaries of the gradient's size live while
    :math:`\hat\epsilon` is computed.)  Each pass waits for the device once.

    *Distributed.*  Sharded parameters (FSDP2, tensor parallel: ``DTensor``) get the norm of the
    whole.

    Examples
    --------
    A closure, as ``torch.optim.LBFGS`` takes it:

    >>> model = nn.Linear(3, 1)
    >>> x, y = torch.ones(4, 3), torch.zeros(4, 1)
    >>> optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, model=model)
    >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = nn.functional.mse_loss(model(x), y)
    ...     loss.backward()
    ...     return loss
    >>> before = closure()
    >>> loss = optimizer.step(closure)            # the loss at the weights, not at the worst point
    >>> scheduler.step()
    >>> bool(loss == before), bool(closure() < before)
    (True, True)

    The same in two phases::

        loss_of(model(x), y).backward()
        optimizer.first_step(zero_grad=True)      # w + ε̂
        loss_of(model(x), y).backward()
        optimizer.second_step(zero_grad=True)     # back to w, and the base's step

    Should something fail between the two, ``optimizer.restore()`` brings the weights back.

    Gradient accumulation: run all microbatches in the closure.  For m-SAM in one process, pass one
    closure a shard, ``optimizer.step([closure_1, closure_2])``: each has its own ε̂, and the
    gradients are averaged.

    float16, with the closure calling ``scaler.scale(loss).backward()``::

        loss = optimizer.step(closure, scaler)
        scaler.update()

    or, in two phases, ``scaler.step(optimizer)`` in place of ``second_step()``.  To clip in two
    phases, ``scaler.unscale_(optimizer)`` goes before; with a closure, a hook of the base sees the
    unscaled gradient::

        def clip(*_):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

        optimizer.base_optimizer.register_step_pre_hook(clip)

    bfloat16 needs no scaler: put ``torch.autocast`` in the closure.

    Several processes (``torchrun --nproc-per-node=2 train.py``)::

        model = DistributedDataParallel(model)
        optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, per_rank=True)

    Lightning: return it from ``configure_optimizers``; automatic optimization passes a closure by
    itself.  Manual optimization (``self.automatic_optimization = False``)::

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()

            def closure():
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                return loss

            optimizer.step(closure=closure)

    Accelerate, with ``accelerator.backward(loss)`` in the closure::

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        optimizer.step(closure)

    (with float16, in two phases: ``optimizer.optimizer.first_step()``, then ``optimizer.step()``).

    References
    ----------
    Foret et al., *Sharpness-Aware Minimization for Efficiently Improving Generalization*, ICLR
    2021; Kwon et al., *ASAM: Adaptive Sharpness-Aware Minimization*, ICML 2021.
    """

    # GradScaler.step() then calls step() in any case, with the scale and what it found, so that the
    # weights are restored even where it finds a gradient that is not finite.
    _step_supports_amp_scaling = True

    base_optimizer: torch.optim.Optimizer
    model: Any  # None, a module, or one in DistributedDataParallel
    found_inf: Tensor  # a GradScaler sets these two
    grad_scale: Tensor | None

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        rho: float = 0.05,
        p: float = 2.0,
        adaptive: bool = False,
        eta: float = 0.01,
        *,
        model: nn.Module | None = None,
        per_rank: bool = False,
    ) -> None:
        if not isinstance(base_optimizer, torch.optim.Optimizer) or isinstance(base_optimizer, SAM):
            raise TypeError(
                "base_optimizer must be an instance of an optimizer, such as "
                f"torch.optim.SGD(model.parameters(), lr=0.1), got {base_optimizer!r}"
            )
        check_ball(rho, p, eta)
        settings = {"rho": rho, "p": p, "adaptive": adaptive, "eta": eta}
        if taken := sorted({*settings} & {*base_optimizer.defaults}):
            raise ValueError(
                f"base_optimizer must have no hyperparameter of SAM's name, got {taken} in "
                f"{type(base_optimizer).__name__}"
            )
        if per_rank and not hasattr(model, "no_sync"):
            raise ValueError(
                "model must be the DistributedDataParallel module where per_rank is True, "
                f"got {type(model).__name__}"
            )
        # What unpickling does: an optimizer's hooks, but no parameters of its own.
        super().__setstate__({"base_optimizer": base_optimizer})
        self.model, self.per_rank, self.skipped = model, per_rank, 0
        self._settings = settings
        self._phase: str | None = None  # between first_step() and its end: "perturbed" or "skip"
        self._weights, self._buffers = _Store(), _Store()  # what they were before first_step()
        self._start: RandomState | None = None  # before the first pass, and after it
        self._after: RandomState | None = None
        for group in self.param_groups:
            self._complete(group)
        if model is not None:
            model.register_forward_pre_hook(_BeforeForward(self))

    # The base optimizer's own: nothing is copied, so nothing can differ.
    param_groups, state, defaults = (
        property(
            lambda self, name=name: getattr(self.base_optimizer, name),  # type: ignore[misc]
            lambda self, value, name=name: setattr(self.base_optimizer, name, value),  # type: ignore[misc]
        )
        for name in ("param_groups", "state", "defaults")
    )  # (mypy infers no lambda with a default)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in any optimizer; the group may have ``rho``, ``p``, ``adaptive`` and ``eta``."""
        self._complete(param_group)
        self.base_optimizer.add_param_group(param_group)

    def _complete(self, group: dict[str, Any]) -> None:
        for name, value in self._settings.items():
            group.setdefault(name, value)
        check_ball(group["rho"], group["p"], group["eta"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in any optimizer."""
        self.base_optimizer.zero_grad(set_to_none)
        if self._phase is None:
            self._start = None

    # ------------------------------------------------------------------------------ steps

    @_eager
    def step(
        self,
        closure: Callable[[], Any] | Iterable[Callable[[], Any]] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Any:
        """Both passes and the base optimizer's step; without a closure, what follows them.

        Parameters
        ----------
        closure : callable, or several
            Zeroes the gradients, computes the loss, calls ``backward`` and returns the loss; it is
            called twice.  Of several, one a shard of the batch, the gradients are averaged.
            ``None``: the end of a step in two phases, as :meth:`second_step`.
        scaler : torch.amp.GradScaler, optional
            The one that scales the loss in the closure; call its ``update()`` afterwards.

        Returns
        -------
        The loss that the closure returned in the first pass; a list of them for several closures.
        """
        if closure is None:
            return self._finish()
        if hasattr(self, "found_inf"):
            del self.found_inf, self.grad_scale
            raise RuntimeError(
                "step(closure) must get the scaler itself: "
                "optimizer.step(closure, scaler), then scaler.update()"
            )
        self.restore()  # of a step that was given up
        closures = [closure] if callable(closure) else list(closure)
        if not closures:
            raise ValueError(f"closure must be one function, or several, got {closure!r}")
        losses: list[Any] = []
        sums: dict[Tensor, Tensor] = {}
        for one in closures:
            loss, finite = self._both_passes(one)
            losses.append(loss)
            if not finite:
                break
            if len(closures) > 1:
                self._accumulate(sums, len(closures), last=len(losses) == len(closures))
        finite = finite and _finite(*self._gradients())
        scaled = scaler is not None and scaler.is_enabled()
        if not finite:
            self._skip(silently=scaled)
        if scaler is not None and scaled:
            if not finite:
                self._spoil()  # so that the scaler of every process lowers its scale
            scaler.step(self.base_optimizer)
        elif finite:
            self.base_optimizer.step()
        return losses[0] if callable(closure) else losses

    def _both_passes(self, closure: Callable[[], Any]) -> tuple[Any, bool]:
        """The loss of the first, and whether there was a second, whose gradient is in ``.grad``."""
        before = self._random_state()
        with torch.enable_grad(), self.model.no_sync() if self.per_rank else nullcontext():
            loss = closure()
        self._start = before
        try:
            self.first_step()
            finite = self._phase == "perturbed"
            if finite:
                self._replay()
                with torch.enable_grad():
                    closure()
        finally:
            self.restore()
        return loss, finite

    @_eager
    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        r"""Go to the worst point, :math:`w+\hat\epsilon`, by the gradient in ``.grad``.

        Parameters
        ----------
        zero_grad : bool
            Zero the gradients afterwards, as the second pass needs it.
        """
        if self._phase is not None:
            raise RuntimeError(
                "first_step() was called twice: second_step() must come between, "
                "or restore() to give up the step"
            )
        balls = self._balls()
        weights, grads, layouts = (
            [x for ball in balls for x in getattr(ball, name)]
            for name in ("weights", "grads", "layouts")
        )
        self._weights.make_room(weights, layouts)
        length = self._weights.length_of(grads)
        finite = self._agree(math.isfinite(length) or _finite(grads, layouts))
        self._weights.save(weights)
        if self.model is not None:
            buffers = [_local(b) for b in self.model.buffers()]
            self._buffers.make_room(buffers, [None] * len(buffers))
            self._buffers.save(buffers)
        self._after = self._random_state() if self._start is not None else None
        self._phase = "perturbed" if finite else "skip"
        try:
            if finite:
                _climb(balls, length)
            if zero_grad:
                self.zero_grad()
        except BaseException:
            self.restore()
            raise

    def second_step(self, zero_grad: bool = False) -> None:
        """Back to the weights, and the base optimizer's step with the gradient in ``.grad``.

        Parameters
        ----------
        zero_grad : bool
            Zero the gradients afterwards.
        """
        self.step()
        if zero_grad:
            self.zero_grad()

    @_eager
    @torch.no_grad()
    def restore(self) -> None:
        """Back to the weights that :meth:`first_step` found, bitwise, without a step."""
        self._weights.restore()
        self._buffers.restore()
        if self._after is not None:
            _set_random_state(self._after)
        self._phase = self._start = self._after = None

    def _finish(self) -> None:
        if self._phase is None:
            raise RuntimeError("step() must get a closure, or come after first_step()")
        finite = self._phase == "perturbed"
        self.restore()
        grads, layouts = self._gradients()
        scaled = hasattr(self, "found_inf")  # called by a GradScaler
        if not finite or (scaled and self.found_inf) or not _finite(grads, layouts):
            return self._skip(silently=scaled)
        if grads and scaled and self.grad_scale is not None:  # None: they have been unscaled
            torch._foreach_mul_(grads, 1 / self.grad_scale.item())
        self.base_optimizer.step()

    def _skip(self, silently: bool) -> None:
        self.skipped += 1
        if not silently and self.skipped == 1:
            warnings.warn(
                "a gradient is infinite or NaN, so the step is skipped; further ones are "
                "only counted, in the attribute `skipped`",
                stacklevel=4,
            )

    # ---------------------------------------------------------------------------- gradients

    def _balls(self) -> list["_Ball"]:
        """The parameters that are to be moved, a ball of settings a group."""
        balls = []
        for group in self.param_groups:
            self._complete(group)  # a checkpoint of the base optimizer alone lacks them
            ball = _Ball(group["rho"], group["p"], group["adaptive"], group["eta"])
            if ball.rho > 0:
                ball.fill(group["params"])
            if ball.weights:
                balls.append(ball)
        if self.per_rank and any(x is not None for ball in balls for x in ball.layouts):
            raise ValueError(
                "per_rank must be False where parameters are sharded: their gradient "
                "is that of all processes"
            )
        return balls

    def _gradients(self) -> tuple[list[Tensor], list[Layout]]:
        every = _Ball()
        for group in self.param_groups:
            every.fill(group["params"])
        return every.grads, every.layouts

    @torch.no_grad()
    def _accumulate(self, sums: dict[Tensor, Tensor], count: int, last: bool) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    share = p.grad / count
                    sums[p] = sums[p].add_(share) if p in sums else share
        for p, total in sums.items() if last else ():
            p.grad = total if p.grad is None else p.grad.copy_(total)

    @torch.no_grad()
    def _spoil(self) -> None:
        for g in self._gradients()[0][:1]:
            g.fill_(math.inf)

    def _agree(self, finite: bool) -> bool:
        """Whether the gradient is finite in all processes that go on together."""
        if not self.per_rank:
            return finite  # all have the same gradient, or have agreed on its norm
        flag = torch.tensor(float(finite), device=self.param_groups[0]["params"][0].device)
        torch.distributed.all_reduce(
            flag, torch.distributed.ReduceOp.MIN, getattr(self.model, "process_group", None)
        )
        return bool(flag)

    # ------------------------------------------------------------- what the second pass leaves

    def _random_state(self) -> RandomState:
        devices = {p.device for group in self.param_groups for p in group["params"]}
        modules = () if self.model is None else self.model.modules()
        return (
            {None: torch.get_rng_state()}
            | {
                d: torch.get_device_module(d).get_rng_state(*_index(d))
                for d in devices
                if d.type not in ("cpu", "meta")
            }
            | {
                (module, name): module.get_buffer(name).clone()
                for module in modules
                for name in getattr(module, "random_buffers", ())
            }
        )

    def _replay(self) -> None:
        """From here on, the random numbers of the first pass again; restore() ends it."""
        _set_random_state(self._start)  # type: ignore[arg-type]  # there is one, or nobody calls
        self._start = None

    def _before_forward(self) -> None:
        """The model's forward pass is about to begin, in training mode."""
        if self._phase is None and self._start is None:
            self._start = self._random_state()
        elif self._phase is not None and self._start is not None:
            self._replay()

    # --------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's, with SAM's settings in its groups."""
        self._check_at_rest("state_dict()")
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From :meth:`state_dict`, or from the base optimizer's alone (the settings stay then)."""
        self._check_at_rest("load_state_dict()")
        ours = [{name: group[name] for name in self._settings} for group in self.param_groups]
        self.base_optimizer.load_state_dict(state_dict)
        for group, settings in zip(self.param_groups, ours, strict=True):
            for name, value in settings.items():
                group.setdefault(name, value)

    def register_state_dict_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        return self.base_optimizer.register_state_dict_pre_hook(*args, **kwargs)

    def register_state_dict_post_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        return self.base_optimizer.register_state_dict_post_hook(*args, **kwargs)

    def register_load_state_dict_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        return self.base_optimizer.register_load_state_dict_pre_hook(*args, **kwargs)

    def register_load_state_dict_post_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        return self.base_optimizer.register_load_state_dict_post_hook(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self._check_at_rest("pickle or deepcopy")
        kept = {"model": self.model, "per_rank": self.per_rank, "skipped": self.skipped}
        return {"base_optimizer": self.base_optimizer} | self._settings | kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        skipped = state.pop("skipped")
        self.__init__(**state)  # type: ignore[misc]  # a subclass keeps this signature
        self.skipped = skipped

    def _check_at_rest(self, what: str) -> None:
        if self._phase is not None:
            raise RuntimeError(
                f"{what} must wait for second_step(): now the weights are moved by "
                "first_step(); restore() gives up the step"
            )

    def __repr__(self) -> str:
        return f"SAM around {self.base_optimizer!r}"


# How first_step() does it: on local tensors, with the kernel above.


class _Ball:
    """Parameters that have a gradient, and the settings that they share."""

    def __init__(
        self, rho: float = 0.0, p: float = 2.0, adaptive: bool = False, eta: float = 0.0
    ) -> None:
        self.rho, self.p, self.adaptive, self.eta = float(rho), float(p), adaptive, float(eta)
        self.weights: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.layouts: list[Layout] = []

    def fill(self, params: Iterable[Any]) -> None:
        dtensor = _dtensor()
        for p in params:
            g, layout = p.grad, None
            if g is None:
                continue
            if g.layout is not torch.strided:
                raise TypeError(
                    "gradients must be dense, got one with layout "
                    f"{g.layout} (of an Embedding with sparse=True?)"
                )
            if isinstance(p, dtensor):
                layout = p.device_mesh, p.placements
                g = g if g.placements == p.placements else g.redistribute(*layout)
                p, g = p.to_local(), g.to_local()
            if p.is_complex():
                p, g = torch.view_as_real(p), torch.view_as_real(g.resolve_conj())
            self.weights.append(p)
            self.grads.append(g)
            self.layouts.append(layout)

    def scales(self) -> list[Tensor]:
        """T = ρ (|w| + η), or ρ."""
        if self.adaptive:
            return [self.rho * (w.abs() + self.eta) for w in self.weights]
        return [torch.tensor(self.rho, device=w.device) for w in self.weights]


class _Store:
    """Room for a copy of some tensors: one piece of memory for all of one type and place."""

    def __init__(self) -> None:
        self.kinds: list[tuple[Any, ...]] = []
        self.pieces: dict[tuple[Any, ...], Tensor] = {}
        self.copies: list[Tensor] = []
        self.saved: list[Tensor] = []

    def make_room(self, tensors: list[Tensor], layouts: list[Layout]) -> None:
        kinds = [(x.shape, x.dtype, x.device, y) for x, y in zip(tensors, layouts, strict=True)]
        if kinds == self.kinds:
            return
        sizes: dict[tuple[Any, ...], list[int]] = {}
        for shape, *place in kinds:
            sizes.setdefault(tuple(place), []).append(shape.numel())
        self.pieces = {
            (dtype, device, layout): torch.empty(sum(n), dtype=dtype, device=device)
            for (dtype, device, layout), n in sizes.items()
        }
        views = {place: iter(self.pieces[place].split(n)) for place, n in sizes.items()}
        self.copies = [next(views[tuple(place)]).view(shape) for shape, *place in kinds]
        self.kinds = kinds

    def length_of(self, grads: list[Tensor]) -> float:
        """‖g‖₂, at least in float32, and infinite if a square leaves its range.

        The norm of one piece of memory is far cheaper than the norms of many tensors.
        """
        if not grads:
            return 0.0
        torch._foreach_copy_(self.copies, grads)
        single = lambda x: torch.promote_types(x.dtype, torch.float32)
        parts = [torch.linalg.vector_norm(x, dtype=single(x)) for x in self.pieces.values()]
        layouts = [layout for _, _, layout in self.pieces]
        return _total_over_shards(parts, "sum", 2, layouts=layouts).sqrt().item()

    def save(self, tensors: list[Tensor]) -> None:
        if tensors:
            torch._foreach_copy_(self.copies, tensors)
        self.saved = tensors

    def restore(self) -> None:
        if self.saved:
            torch._foreach_copy_(self.saved, self.copies)
        self.saved = []


@torch.no_grad()
def _climb(balls: list[_Ball], length: float) -> None:
    """w ← w + ε̂, in place."""
    alike = len({ball.rho for ball in balls}) < 2 and not any(ball.adaptive for ball in balls)
    if alike and all(ball.p == 2 for ball in balls) and 1e-15 < length < 1e15:
        for ball in balls:  # no square has left float32's range, and no memory is needed
            torch._foreach_add_(ball.weights, ball.grads, alpha=ball.rho / length)
        return
    for p in dict.fromkeys(ball.p for ball in balls):
        ours = [ball for ball in balls if ball.p == p]
        weights, grads, layouts = (
            [x for ball in ours for x in getattr(ball, name)]
            for name in ("weights", "grads", "layouts")
        )
        rho, scales = (ours[0].rho, None) if alike else (1.0, [t for b in ours for t in b.scales()])
        total = partial(_total_over_shards, layouts=layouts)
        one_device = len({w.device for w in weights}) == 1
        epsilon = perturbation(grads, rho, p, scales, total, foreach=one_device)
        torch._foreach_add_(weights, epsilon)


@torch.no_grad()
def _finite(grads: list[Tensor], layouts: list[Layout]) -> bool:
    """Whether there is no infinity and no NaN, in any shard."""
    kinds = [(g.device, g.dtype) for g in grads]
    found = {kind: torch.zeros((), device=kind[0]) for kind in set(kinds)}
    for (device, dtype), flag in found.items():
        alike = (
            grads
            if len(found) == 1
            else [g for g, kind in zip(grads, kinds, strict=True) if kind == (device, dtype)]
        )
        if device.type in ("cpu", "cuda", "xpu"):  # as GradScaler does it: in one launch
            torch._amp_foreach_non_finite_check_and_unscale_(alike, flag, torch.ones_like(flag))
        else:
            flag.fill_(not all(g.isfinite().all() for g in alike))
    if not any(layouts):
        return not any(found.values())
    return not _total_over_shards([found[kind] for kind in kinds], "amax", layouts=layouts)


def _total_over_shards(
    parts: list[Tensor], op: str, power: float = 1, *, layouts: list[Layout]
) -> Tensor:
    """One number of one a tensor, from all shards of those that are sharded."""
    if not any(layouts):
        return total_of(parts, op, power)
    totals = []
    for layout in dict.fromkeys(layouts):  # one collective for all tensors that are laid out alike
        alike = [x for x, y in zip(parts, layouts, strict=True) if y == layout]
        totals.append(total_of(alike, op, power))
        if layout is not None:
            from torch.distributed.tensor import DTensor, Partial, Replicate

            mesh, placements = layout
            how = {"sum": "sum", "amax": "max"}[op]
            pieces = [Replicate() if x.is_replicate() else Partial(how) for x in placements]
            part = DTensor.from_local(totals.pop(), mesh, pieces, run_check=False)
            totals.append(part.full_tensor())
    return total_of(totals, op)


def _dtensor() -> Any:
    """The class DTensor; if nobody has imported it, no tensor is one."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, _dtensor()) else x


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)


def _set_random_state(states: RandomState) -> None:
    for where, state in states.items():
        if where is None:
            torch.set_rng_state(state)
        elif isinstance(where, tuple):
            module, name = where
            module.get_buffer(name).copy_(state)
        else:
            torch.get_device_module(where).set_rng_state(state, *_index(where))


class _BeforeForward:
    """A hook that tells SAM of the model's forward passes; a copy of the model has an idle one."""

    def __init__(self, owner: SAM | None = None) -> None:
        self.owner = weakref.ref(owner) if owner is not None else lambda: None

    def __call__(self, module: nn.Module, args: Any) -> None:
        owner = self.owner()
        if owner is not None and module.training:
            owner._before_forward()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _BeforeForward, ()
