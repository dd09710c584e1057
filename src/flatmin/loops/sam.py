r"""SAM as an optimizer, for a training loop of your own.

:mod:`flatmin.gradient.sam` derives the perturbation.  The code around it here restores the weights,
whatever happens in the second pass.
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

from .._ball import check_ball, perturbation, total_over_tensors

__all__ = ["SAM"]

P = ParamSpec("P")
T = TypeVar("T")
Layout = Any  # of a sharded tensor: its mesh and placements; None: not sharded
RandomState = dict[Any, Tensor]  # by device (None: the CPU), or by module and name of a buffer


def _eager(method: Callable[P, T]) -> Callable[P, T]:
    """Not traced by ``torch.compile``: compile the model and the base optimizer's step instead."""
    disabled: Callable[P, T] | None = None

    @wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal disabled
        if disabled is None:  # not sooner, because importing the compiler is slow
            disabled = torch.compiler.disable(method)
        return disabled(*args, **kwargs)

    return run


class SAM(torch.optim.Optimizer):
    r"""SAM around any optimizer: two passes per step, and the base optimizer takes the step.

    .. math:: w \leftarrow \operatorname{base}\big(w,\ \nabla L(w+\hat\epsilon)\big)

    Parameters
    ----------
    base_optimizer : Optimizer
        Any instance.  Its ``param_groups`` and ``state`` are shared, so a scheduler may be given
        either optimizer, and checkpoints are those of the base optimizer.
    rho : float
        The radius :math:`\rho\ge0`.
    p : float
        The norm, in [1, ∞].
    adaptive : bool
        The neighbourhood scales with the weights, :math:`T=|w|+\eta` (ASAM).
    eta : float
        :math:`\eta\ge0` of the adaptive form.
    model : Module, optional
        The network (as it is called: the ``DistributedDataParallel`` wrapper, if there is one).  If
        it is given, only the first pass updates its buffers, such as BatchNorm's statistics, and
        the second pass repeats the random numbers of the first in the two-phase use, too.
    per_rank : bool
        Under ``DistributedDataParallel``: every process climbs the gradient of its own part of the
        batch (m-SAM, as in the paper), which saves one of two all-reduces.  ``step(closure)`` runs
        the first pass under ``model.no_sync()``; in the two-phase use, do so yourself.  ``False``:
        all climb the gradient of the whole batch.

    Attributes
    ----------
    base_optimizer : Optimizer
    skipped : int
        How many steps were skipped because a gradient was infinite or NaN.

    Notes
    -----
    *Groups.* ``rho``, ``p``, ``adaptive`` and ``eta`` may be set per parameter group, like ``lr``.
    All groups with the same p share one ball, :math:`\|T^{-1}\epsilon\|_p\le1` with
    :math:`T=\rho\,(|w|+\eta)` or :math:`T=\rho` with each group's settings: splitting a group in
    two changes nothing, and ``rho=0`` does not perturb a group (biases, say).  The original ASAM
    code treats biases as not adaptive: give them a group with ``adaptive=False``.

    *Left to the base optimizer.*  Weight decay: if it is part of ``base_optimizer``, it is outside
    the maximum, and not part of :math:`\hat\epsilon`.  A zero gradient: then
    :math:`\hat\epsilon=0`, and the base takes the step that it takes at a zero gradient.

    *Skipped steps.*  If a gradient is infinite or NaN in either pass, no step is taken, and the
    weights and the base's state are bitwise unchanged.

    *Clipping* in the closure works: clipping the first gradient does not change
    :math:`\hat\epsilon`.  A scaled loss works, too.

    *Cost.*  Two forward–backward passes, and memory for one copy of the weights, from which they
    are restored bitwise whatever happens in the second pass.  (With p≠2, with ``adaptive``, or with
    groups of different ``rho``, computing :math:`\hat\epsilon` takes temporary memory of the
    gradient's size.)  Each pass waits for the device once.

    *Distributed.*  The norm of sharded parameters (FSDP2, tensor parallel: ``DTensor``) is that of
    all shards.

    Examples
    --------
    A closure, as ``torch.optim.LBFGS`` takes it:

    >>> _ = torch.manual_seed(0)
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

    If something fails between the two, ``optimizer.restore()`` brings the weights back.

    Gradient accumulation: run all microbatches in the closure.  For m-SAM in one process, pass one
    closure per shard, ``optimizer.step([closure_1, closure_2])``: each has its own ε̂, and the
    gradients are averaged.

    float16, with the closure calling ``scaler.scale(loss).backward()``::

        loss = optimizer.step(closure, scaler)
        scaler.update()

    or, in two phases, ``scaler.step(optimizer)`` in place of ``second_step()``.  To clip in two
    phases, first call ``scaler.unscale_(optimizer)``; with a closure, use a hook of the base, which
    sees the unscaled gradient::

        def clip(*_):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

        optimizer.base_optimizer.register_step_pre_hook(clip)

    bfloat16 needs no scaler: put ``torch.autocast`` in the closure.

    Several processes (``torchrun --nproc-per-node=2 train.py``)::

        model = DistributedDataParallel(model)
        optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, per_rank=True)

    Lightning: return it from ``configure_optimizers``; automatic optimization passes a closure.
    Manual optimization (``self.automatic_optimization = False``)::

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

    # With this, GradScaler.step() always calls step() and passes it the scale and what it found, so
    # the weights are restored even if a gradient is not finite.
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
                f"base_optimizer must have no hyperparameter named like SAM's, got {taken} in "
                f"{type(base_optimizer).__name__}"
            )
        if per_rank and not hasattr(model, "no_sync"):
            raise ValueError(
                "model must be the DistributedDataParallel module if per_rank is True, "
                f"got {type(model).__name__}"
            )
        # As in unpickling: sets up an optimizer's hooks, but no parameters of its own.
        super().__setstate__({"base_optimizer": base_optimizer})
        self.model, self.per_rank, self.skipped = model, per_rank, 0
        self._settings = settings
        self._phase: str | None = None  # between first_step() and its end: "perturbed" or "skip"
        self._weights, self._buffers = _Backup(), _Backup()  # from before first_step()
        self._random_before: RandomState | None = None  # before the first pass
        self._random_after: RandomState | None = None  # after the first pass
        for group in self.param_groups:
            self._complete_settings(group)
        if model is not None:
            model.register_forward_pre_hook(_BeforeForward(self))

    # These belong to the base optimizer: nothing is copied, so nothing can differ.
    param_groups, state, defaults = (
        property(
            lambda self, name=name: getattr(self.base_optimizer, name),  # type: ignore[misc]
            lambda self, value, name=name: setattr(self.base_optimizer, name, value),  # type: ignore[misc]
        )
        for name in ("param_groups", "state", "defaults")
    )  # (mypy cannot infer a lambda with a default)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in any optimizer; the group may have ``rho``, ``p``, ``adaptive`` and ``eta``."""
        self._complete_settings(param_group)
        self.base_optimizer.add_param_group(param_group)

    def _complete_settings(self, group: dict[str, Any]) -> None:
        for name, value in self._settings.items():
            group.setdefault(name, value)
        check_ball(group["rho"], group["p"], group["eta"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in any optimizer."""
        self.base_optimizer.zero_grad(set_to_none)
        if self._phase is None:
            self._random_before = None

    # ------------------------------------------------------------------------------ steps

    @_eager
    def step(
        self,
        closure: Callable[[], Any] | Iterable[Callable[[], Any]] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Any:
        """Both passes and the base optimizer's step; without a closure, what follows the passes.

        Parameters
        ----------
        closure : callable, or several
            Zeroes the gradients, computes the loss, calls ``backward`` and returns the loss; it is
            called twice.  With several, one per shard of the batch, the gradients are averaged.
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
        self.restore()  # if a step was given up
        closures = [closure] if callable(closure) else list(closure)
        if not closures:
            raise ValueError(f"closure must be one function, or several, got {closure!r}")
        losses: list[Any] = []
        sums: dict[Tensor, Tensor] = {}
        for shard_closure in closures:
            loss, finite = self._both_passes(shard_closure)
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
                self._make_gradient_infinite()  # so that every process's scaler lowers its scale
            scaler.step(self.base_optimizer)
        elif finite:
            self.base_optimizer.step()
        return losses[0] if callable(closure) else losses

    def _both_passes(self, closure: Callable[[], Any]) -> tuple[Any, bool]:
        """The loss of the first pass, and whether a second one left its gradient in ``.grad``."""
        before = self._random_state()
        with torch.enable_grad(), self.model.no_sync() if self.per_rank else nullcontext():
            loss = closure()
        self._random_before = before
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
            Zero the gradients afterwards, as the second pass requires.
        """
        if self._phase is not None:
            raise RuntimeError(
                "first_step() was called twice: second_step() must come between, "
                "or restore() to give up the step"
            )
        groups = self._perturbed_groups()
        weights, grads, layouts = (
            [x for group in groups for x in getattr(group, name)]
            for name in ("weights", "grads", "layouts")
        )
        self._weights.allocate(weights, layouts)
        length = self._weights.norm_of(grads)
        finite = self._finite_in_all_ranks(math.isfinite(length) or _finite(grads, layouts))
        self._weights.save(weights)
        if self.model is not None:
            buffers = [_local(b) for b in self.model.buffers()]
            self._buffers.allocate(buffers, [None] * len(buffers))
            self._buffers.save(buffers)
        self._random_after = self._random_state() if self._random_before is not None else None
        self._phase = "perturbed" if finite else "skip"
        try:
            if finite:
                _climb(groups, length)
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
        if self._random_after is not None:
            _set_random_state(self._random_after)
        self._phase = self._random_before = self._random_after = None

    def _finish(self) -> None:
        if self._phase is None:
            raise RuntimeError("step() must get a closure, or come after first_step()")
        finite = self._phase == "perturbed"
        self.restore()
        grads, layouts = self._gradients()
        scaled = hasattr(self, "found_inf")  # called by a GradScaler
        if not finite or (scaled and self.found_inf) or not _finite(grads, layouts):
            return self._skip(silently=scaled)
        if grads and scaled and self.grad_scale is not None:  # None: already unscaled
            torch._foreach_mul_(grads, 1 / self.grad_scale.item())
        self.base_optimizer.step()

    def _skip(self, silently: bool) -> None:
        self.skipped += 1
        if not silently and self.skipped == 1:
            warnings.warn(
                "a gradient is infinite or NaN, so the step is skipped; further skipped "
                "steps are only counted, in the attribute `skipped`",
                stacklevel=4,
            )

    # ---------------------------------------------------------------------------- gradients

    def _perturbed_groups(self) -> list["_PerturbedGroup"]:
        """The parameters to perturb, with the settings of each group."""
        groups = []
        for group in self.param_groups:
            self._complete_settings(group)  # a checkpoint of the base optimizer lacks them
            moved = _PerturbedGroup(group["rho"], group["p"], group["adaptive"], group["eta"])
            if moved.rho > 0:
                moved.add(group["params"])
            if moved.weights:
                groups.append(moved)
        if self.per_rank and any(x is not None for moved in groups for x in moved.layouts):
            raise ValueError(
                "per_rank must be False if parameters are sharded: their gradient "
                "is that of all processes"
            )
        return groups

    def _gradients(self) -> tuple[list[Tensor], list[Layout]]:
        all_groups = _PerturbedGroup()
        for group in self.param_groups:
            all_groups.add(group["params"])
        return all_groups.grads, all_groups.layouts

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
    def _make_gradient_infinite(self) -> None:
        for g in self._gradients()[0][:1]:
            g.fill_(math.inf)

    def _finite_in_all_ranks(self, finite: bool) -> bool:
        """Whether the gradient is finite in all processes that share the step."""
        if not self.per_rank:
            return finite  # all processes have the same gradient, or the same norm of it
        flag = torch.tensor(float(finite), device=self.param_groups[0]["params"][0].device)
        torch.distributed.all_reduce(
            flag, torch.distributed.ReduceOp.MIN, getattr(self.model, "process_group", None)
        )
        return bool(flag)

    # ----------------------------------------------------------------------- random numbers

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
        """Repeat the random numbers of the first pass from here on, until restore()."""
        _set_random_state(self._random_before)  # type: ignore[arg-type]  # callers check this
        self._random_before = None

    def _before_forward(self) -> None:
        """The model's forward pass is about to begin, in training mode."""
        if self._phase is None and self._random_before is None:
            self._random_before = self._random_state()
        elif self._phase is not None and self._random_before is not None:
            self._replay()

    # --------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's, with SAM's settings in its groups."""
        self._check_not_perturbed("state_dict()")
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From :meth:`state_dict`, or from that of the base optimizer alone (settings stay)."""
        self._check_not_perturbed("load_state_dict()")
        current = [{name: group[name] for name in self._settings} for group in self.param_groups]
        self.base_optimizer.load_state_dict(state_dict)
        for group, settings in zip(self.param_groups, current, strict=True):
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
        self._check_not_perturbed("pickle or deepcopy")
        kept = {"model": self.model, "per_rank": self.per_rank, "skipped": self.skipped}
        return {"base_optimizer": self.base_optimizer} | self._settings | kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        skipped = state.pop("skipped")
        self.__init__(**state)  # type: ignore[misc]  # a subclass keeps this signature
        self.skipped = skipped

    def _check_not_perturbed(self, what: str) -> None:
        if self._phase is not None:
            raise RuntimeError(
                f"{what} must wait for second_step(): first_step() has moved the weights; "
                "restore() gives up the step"
            )

    def __repr__(self) -> str:
        return f"SAM around {self.base_optimizer!r}"


# The parts of first_step(), on local tensors.


class _PerturbedGroup:
    """Parameters that have a gradient, and the settings that they share."""

    def __init__(
        self, rho: float = 0.0, p: float = 2.0, adaptive: bool = False, eta: float = 0.0
    ) -> None:
        self.rho, self.p, self.adaptive, self.eta = float(rho), float(p), adaptive, float(eta)
        self.weights: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.layouts: list[Layout] = []

    def add(self, params: Iterable[Any]) -> None:
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


class _Backup:
    """Copies of tensors, in one piece of memory per dtype, device and layout."""

    def __init__(self) -> None:
        self.allocated: list[tuple[Any, ...]] = []
        self.pieces: dict[tuple[Any, ...], Tensor] = {}
        self.copies: list[Tensor] = []
        self.saved: list[Tensor] = []

    def allocate(self, tensors: list[Tensor], layouts: list[Layout]) -> None:
        wanted = [(x.shape, x.dtype, x.device, y) for x, y in zip(tensors, layouts, strict=True)]
        if wanted == self.allocated:
            return
        sizes: dict[tuple[Any, ...], list[int]] = {}
        for shape, *kind in wanted:
            sizes.setdefault(tuple(kind), []).append(shape.numel())
        self.pieces = {
            (dtype, device, layout): torch.empty(sum(n), dtype=dtype, device=device)
            for (dtype, device, layout), n in sizes.items()
        }
        views = {kind: iter(self.pieces[kind].split(n)) for kind, n in sizes.items()}
        self.copies = [next(views[tuple(kind)]).view(shape) for shape, *kind in wanted]
        self.allocated = wanted

    def norm_of(self, grads: list[Tensor]) -> float:
        """‖g‖₂, at least in float32, and infinite if a square overflows.

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
def _climb(groups: list[_PerturbedGroup], length: float) -> None:
    """w ← w + ε̂, in place."""
    plain = len({group.rho for group in groups}) < 2 and not any(g.adaptive for g in groups)
    if plain and all(group.p == 2 for group in groups) and 1e-15 < length < 1e15:
        for group in groups:  # no square has left float32's range, and no memory is needed
            torch._foreach_add_(group.weights, group.grads, alpha=group.rho / length)
        return
    for p in dict.fromkeys(group.p for group in groups):
        ball = [group for group in groups if group.p == p]
        weights, grads, layouts = (
            [x for group in ball for x in getattr(group, name)]
            for name in ("weights", "grads", "layouts")
        )
        rho, scales = (ball[0].rho, None) if plain else (1.0, [t for g in ball for t in g.scales()])
        total = partial(_total_over_shards, layouts=layouts)
        one_device = len({w.device for w in weights}) == 1
        epsilon = perturbation(grads, rho, p, scales, total, foreach=one_device)
        torch._foreach_add_(weights, epsilon)


@torch.no_grad()
def _finite(grads: list[Tensor], layouts: list[Layout]) -> bool:
    """Whether no gradient is infinite or NaN, in any shard."""
    kinds = [(g.device, g.dtype) for g in grads]
    not_finite = {kind: torch.zeros((), device=kind[0]) for kind in set(kinds)}
    for (device, dtype), flag in not_finite.items():
        of_kind = (
            grads
            if len(not_finite) == 1
            else [g for g, kind in zip(grads, kinds, strict=True) if kind == (device, dtype)]
        )
        if device.type in ("cpu", "cuda", "xpu"):  # as GradScaler does it: in one launch
            torch._amp_foreach_non_finite_check_and_unscale_(of_kind, flag, torch.ones_like(flag))
        else:
            flag.fill_(not all(g.isfinite().all() for g in of_kind))
    if not any(layouts):
        return not any(not_finite.values())
    return not _total_over_shards([not_finite[kind] for kind in kinds], "amax", layouts=layouts)


def _total_over_shards(
    parts: list[Tensor], op: str, power: float = 1, *, layouts: list[Layout]
) -> Tensor:
    """One number per tensor reduced to one, over all shards of sharded tensors."""
    if not any(layouts):
        return total_over_tensors(parts, op, power)
    totals = []
    for layout in dict.fromkeys(layouts):  # one collective per layout
        same_layout = [x for x, y in zip(parts, layouts, strict=True) if y == layout]
        totals.append(total_over_tensors(same_layout, op, power))
        if layout is not None:
            from torch.distributed.tensor import DTensor, Partial, Replicate

            mesh, placements = layout
            reduction = {"sum": "sum", "amax": "max"}[op]
            pieces = [Replicate() if x.is_replicate() else Partial(reduction) for x in placements]
            part = DTensor.from_local(totals.pop(), mesh, pieces, run_check=False)
            totals.append(part.full_tensor())
    return total_over_tensors(totals, op)


def _dtensor() -> Any:
    """The class DTensor, or () if it was never imported: then no tensor is one."""
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
    """Tells SAM when the model's forward pass begins; in a copy of the model it does nothing."""

    def __init__(self, owner: SAM | None = None) -> None:
        self.owner = weakref.ref(owner) if owner is not None else lambda: None

    def __call__(self, module: nn.Module, args: Any) -> None:
        owner = self.owner()
        if owner is not None and module.training:
            owner._before_forward()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _BeforeForward, ()
