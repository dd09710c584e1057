r"""SAM as an optimizer, for a training loop of your own.

:mod:`flatmin.gradient.sam` derives the perturbation.  The code around it here restores the weights,
whatever happens in the second pass; ``flatmin._flat`` does the arithmetic.
"""

import itertools
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from .._ball import check_ball
from .._flat import FlatWeights, Kinds, Member, all_finite, members_of

__all__ = ["SAM"]


class SAM(torch.optim.Optimizer):
    r"""SAM around any optimizer: two passes per step, and the base optimizer takes the step.

    .. math:: w \leftarrow \operatorname{base}\big(w,\ \nabla L(w+\hat\epsilon)\big)

    The page *Using SAM in your loop* of the book shows it with accumulation, clipping, mixed
    precision, several processes, Lightning and Accelerate.

    Parameters
    ----------
    base_optimizer : Optimizer
        Any instance that minimizes and needs no closure.  Its ``param_groups`` and ``state`` are
        shared, so a scheduler may be given either optimizer, and checkpoints are those of the base
        optimizer.
    rho, p, adaptive, eta
        As in :class:`flatmin.gradient.SAM`; each may be set per parameter group, like ``lr``, and
        what a group already has, also from a checkpoint, is kept.  All groups with the same p have
        one norm :math:`\|T^{-1}\epsilon\|_p\le1`, with :math:`T=\rho\,(|w|+\eta)` or
        :math:`T=\rho` by each group's settings.
    model : Module, optional
        The network, as it is called (if wrapped in ``DistributedDataParallel``, the wrapper).  With
        it, only the first pass updates buffers (batch statistics), and the second pass repeats the
        random numbers of the first in two-phase use, too.  :class:`flatmin.layers.Dropout` needs it
        in any use, since its random numbers are a function of its buffers.  ``step(closure)``
        leaves its parameters that SAM does not hold the gradient of the second pass, like SAM's.
    per_rank : bool
        Under ``DistributedDataParallel``: ``True`` gives every process the perturbation of its own
        part of the batch (m-SAM) and saves an all-reduce; ``False``: that of the whole batch.

    Attributes
    ----------
    skipped : int
        How many steps were skipped because a gradient was infinite or NaN, in either pass.  Such a
        step leaves the weights and the base's state bitwise unchanged.

    Examples
    --------
    >>> model, (x, y) = nn.Linear(3, 1), (torch.ones(4, 3), torch.full((4, 1), 9.0))
    >>> optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, model=model)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = nn.functional.mse_loss(model(x), y)
    ...     loss.backward()
    ...     return loss
    >>> before = nn.functional.mse_loss(model(x), y)
    >>> loss = optimizer.step(closure)            # the loss at w, not at the worst point
    >>> bool(loss == before), bool(closure() < before)
    (True, True)

    In two phases: ``backward()``, :meth:`first_step`, ``backward()``, :meth:`second_step`.
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
        **unknown: Any,
    ) -> None:
        if unknown:
            raise TypeError(
                "SAM must get an optimizer that has its own settings, as in SAM(torch.optim.SGD("
                f"model.parameters(), lr=0.1), rho=0.05), got the keyword arguments {[*unknown]}"
            )
        if not isinstance(base_optimizer, torch.optim.Optimizer) or isinstance(base_optimizer, SAM):
            raise TypeError(
                "base_optimizer must be an instance of an optimizer, such as "
                f"torch.optim.SGD(model.parameters(), lr=0.1), got {base_optimizer!r}"
            )
        if isinstance(base_optimizer, torch.optim.LBFGS):
            raise TypeError("base_optimizer must step without a closure, got LBFGS")
        settings: dict[str, Any] = {"rho": rho, "p": p, "adaptive": adaptive, "eta": eta}
        _check_settings(**settings)
        if taken := sorted({*settings} & {*base_optimizer.defaults}):
            raise ValueError(
                f"base_optimizer must have no hyperparameter named like SAM's, got {taken} in "
                f"{type(base_optimizer).__name__}; use another optimizer"
            )
        if not isinstance(model, nn.Module | None) or isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                f"model must be None or a Module that is not scripted, got {type(model).__name__}; "
                "for several networks give nn.ModuleList([...]), and use step(closure)"
            )
        if per_rank and not hasattr(model, "no_sync"):
            raise ValueError(
                "model must be the DistributedDataParallel module if per_rank is True, "
                f"got {type(model).__name__}"
            )
        if per_rank and getattr(model, "static_graph", False):
            raise ValueError(
                "per_rank must be False if DistributedDataParallel has static_graph=True, which "
                "does not allow a pass without communication, got True"
            )
        # As in unpickling: sets up an optimizer's hooks, but no parameters of its own.
        super().__setstate__({"base_optimizer": base_optimizer})
        self.model, self.per_rank, self.skipped = model, per_rank, 0
        self._settings = settings
        self._phase: str | None = None  # between first_step() and its end: "perturbed" or "skip"
        self._flat: dict[float, FlatWeights] = {}  # by p
        self._called: _Snapshot | None = None  # of the model's last forward pass
        self._before: _Snapshot | None = None  # of the first forward pass with a gradient
        self._after: _Snapshot | None = None
        # The arguments replace what an earlier SAM put into the groups.
        filled = base_optimizer.__dict__.setdefault("_filled_by_sam", {})
        for i, group in enumerate(self.param_groups):
            for name in filled.pop(i, ()):
                group.pop(name, None)
            filled[i] = self._fill(group)
        for group in self.param_groups:
            if any(hasattr(w, "_fsdp_flattened") for w in group["params"]):
                raise TypeError(
                    "base_optimizer must not hold parameters of FullyShardedDataParallel, whose "
                    "norm would be that of one shard; shard with FSDP2, fully_shard(model)"
                )
        handles = []
        if hasattr(base_optimizer, "_optimizer_step_post_hooks"):  # Accelerate's wrapper has none
            # The base optimizer may step alone.
            handles.append(base_optimizer.register_step_post_hook(_Hook(self, "_forget")))
        if model is not None:
            handles.append(model.register_forward_pre_hook(_Hook(self, "_before_forward")))
            handles.append(model.register_forward_hook(_Hook(self, "_after_forward")))
        for handle in handles:
            weakref.finalize(self, handle.remove)

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
        filled = self._fill(param_group)
        self.base_optimizer.add_param_group(param_group)
        self.base_optimizer.__dict__["_filled_by_sam"][len(self.param_groups) - 1] = filled

    def _fill(self, group: dict[str, Any]) -> list[str]:
        """Complete a group's settings; returns the names of those that it lacked."""
        lacking = [name for name in self._settings if name not in group]
        group |= {name: self._settings[name] for name in lacking}
        _check_settings(**{name: group[name] for name in self._settings})
        if group.get("maximize", False):
            raise ValueError("maximize must be False in all groups, got True; negate the loss")
        return lacking

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in any optimizer; the next backward pass is then the first of a step."""
        self.base_optimizer.zero_grad(set_to_none)
        if self._phase is None:
            self._forget()

    # ------------------------------------------------------------------------------ steps

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Any:
        """Both passes and the base optimizer's step; without a closure, what follows the passes.

        Parameters
        ----------
        closure : callable
            Computes the loss, calls ``backward`` and returns the loss; it is called twice, each
            time without gradients (``None``).  ``None``: the end of a step in two phases, as
            :meth:`second_step`.
        scaler : torch.amp.GradScaler, optional
            The one that scales the loss in the closure; call its ``update()`` afterwards.  Its
            ``unscale_`` is called here, after both passes.

        Returns
        -------
        The loss that the closure returned in the first pass.
        """
        if closure is None:
            return self._finish()
        if not callable(closure):
            raise TypeError(
                "closure must be a function that computes the loss, calls backward() and returns "
                f"the loss, got {closure!r}"
            )
        if hasattr(self, "found_inf"):
            del self.found_inf, self.grad_scale
            raise RuntimeError(
                "step(closure) must get the scaler itself: "
                "optimizer.step(closure, scaler), then scaler.update()"
            )
        self._check_before_closure(closure)
        loss, finite = self._both_passes(closure)
        scaled = scaler is not None and scaler.is_enabled()
        if not finite:
            self._skip(silently=scaled)
        if scaler is not None and scaled:
            if not finite:
                self._make_gradient_infinite()  # so that every process's scaler lowers its scale
            # A fused optimizer would leave it to its kernel, after the hooks that clip.
            scaler.unscale_(self.base_optimizer)
            scaler.step(self.base_optimizer)
        elif finite:
            self.base_optimizer.step()
        return loss

    def _both_passes(self, closure: Callable[[], Any]) -> tuple[Any, bool]:
        """The loss of the first pass, and whether the gradients of both are finite."""
        self._drop_gradients()
        before = self._snapshot()
        try:
            alone = self.model.no_sync() if self.per_rank else nullcontext()
            with torch.enable_grad(), alone, self._other_gradients_kept():
                loss = closure()
            self._before = before
            self.first_step()
            if self._phase == "perturbed":
                self._drop_gradients()
                self._before = None  # first_step() has restored it
                with torch.enable_grad():
                    closure()
            finite = self._phase == "perturbed"
        finally:
            self.restore()
        return loss, finite and all_finite(self._members())

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
        members = self._members_to_move()
        self._flat = {p: FlatWeights(kinds, self._flat.get(p)) for p, kinds in members.items()}
        moves = [self._flat[p].perturbation(p, kinds) for p, kinds in members.items()]
        finite = self._finite_in_all_ranks(all(math.isfinite(step) for _, step in moves))
        for flat in self._flat.values():
            flat.save()
        if self.model is not None or self._before is not None:
            self._after = self._snapshot()
        self._phase = "perturbed" if finite else "skip"
        try:
            for flat, (v, step) in zip(self._flat.values(), moves if finite else []):
                flat.move(v, step)
            _forget_casts()
            if finite and self._before is not None:
                self._before.restore()  # here, too: checkpoint notes it before the forward pass
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

    @torch.no_grad()
    def restore(self) -> None:
        """Back to the weights that :meth:`first_step` found, bitwise, without a step."""
        for flat in self._flat.values() if self._phase is not None else ():
            flat.restore()
        _forget_casts()
        if self._after is not None:
            self._after.restore()
        self._phase = self._before = self._after = None

    def _finish(self) -> None:
        if self._phase is None and self._is_primed():
            return self.base_optimizer.step()
        if self._phase is None:
            for name in ("found_inf", "grad_scale"):
                self.__dict__.pop(name, None)
            raise RuntimeError(
                "step() must get a closure, or come after first_step(); what calls step() without "
                "a closure, as the GradScaler of Lightning's 16-mixed does, needs the two-phase "
                "form: backward(), first_step(), backward(), step()"
            )
        finite = self._phase == "perturbed"
        self.restore()
        scaled = hasattr(self, "found_inf")  # called by a GradScaler
        if not finite or (scaled and self.found_inf) or not all_finite(self._members()):
            return self._skip(silently=scaled)
        if scaled and self.grad_scale is not None:  # None: already unscaled
            for member in self._members():
                member.grad.mul_(1 / self.grad_scale.item())
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

    def _members(self) -> list[Member]:
        return [m for group in self.param_groups for m in members_of(group)]

    def _members_to_move(self) -> dict[float, Kinds]:
        """The parameters that are to be perturbed, by p and kind."""
        to_move: dict[float, Kinds] = {}
        for group in self.param_groups:
            self._fill(group)  # a checkpoint of the base optimizer lacks them
            for member in members_of(group) if group["rho"] > 0 else ():
                if self.per_rank and member.layout is not None:
                    raise ValueError(
                        "per_rank must be False if parameters are sharded: their gradient "
                        "is that of all processes"
                    )
                kinds = to_move.setdefault(float(group["p"]), {})
                kinds.setdefault(member.kind, []).append(member)
        return to_move

    def _check_before_closure(self, closure: Callable[[], Any]) -> None:
        """That ``step(closure)`` drops nothing that somebody has computed."""
        if self._phase is not None:
            raise RuntimeError(
                "step(closure) must not come after first_step(): second_step() ends the step, "
                "restore() gives it up (Lightning's step() passes a closure of its own: call "
                "optimizer.optimizer.second_step())"
            )
        for module in closure.args if isinstance(closure, partial) else ():  # Lightning's
            trainer = getattr(module, "_trainer", None)
            parts = getattr(trainer, "accumulate_grad_batches", 1)
            if parts != 1 and trainer.training:  # type: ignore[union-attr]
                raise ValueError(
                    f"accumulate_grad_batches must be 1, got {parts}: Lightning's closure computes "
                    "the last microbatch only; use manual optimization, all microbatches in the "
                    "closure"
                )

    def _is_primed(self) -> bool:
        """torch.distributed.checkpoint makes the state by a step from zero gradients, at lr 0."""
        if any(group.get("lr") != 0 for group in self.param_groups):
            return False
        grads = [member.grad for member in self._members()]
        return bool(grads) and not any(g.any() for g in grads)

    def _drop_gradients(self) -> None:
        """So that a closure need not zero them; those that somebody has kept stay as they are."""
        for group in self.param_groups:
            for w in group["params"]:
                w.grad = None

    @contextmanager
    def _other_gradients_kept(self) -> Iterator[None]:
        """The first pass adds nothing to the model's parameters that another optimizer holds."""
        own = {w for group in self.param_groups for w in group["params"]}
        others = set() if self.model is None else set(self.model.parameters()) - own
        kept = {w: w.grad for w in others}
        for w in kept:
            w.grad = None
        try:
            yield
        finally:
            for w, g in kept.items():
                w.grad = g

    @torch.no_grad()
    def _make_gradient_infinite(self) -> None:
        for member in self._members()[:1]:
            member.grad.fill_(math.inf)

    def _finite_in_all_ranks(self, finite: bool) -> bool:
        """Whether the gradient is finite in all processes that share the step."""
        if not self.per_rank:
            return finite  # all processes have the same gradient, or the same norm of it
        flag = torch.tensor(float(finite), device=self.param_groups[0]["params"][0].device)
        torch.distributed.all_reduce(
            flag, torch.distributed.ReduceOp.MIN, getattr(self.model, "process_group", None)
        )
        return bool(flag)

    # ------------------------------------------------------------- random numbers and buffers

    def _snapshot(self) -> "_Snapshot":
        devices = {p.device for group in self.param_groups for p in group["params"]}
        return _Snapshot(devices, self.model)

    def _replay(self) -> None:
        """Let the second pass start from the random numbers and buffers of the first."""
        if self._before is not None:
            self._before.restore()
        self._before = None

    def _forget(self, *_: Any) -> None:
        """The gradients so far have had their step, or are gone: so is their first pass."""
        self._before = None

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        """The model is called; in training mode and for a gradient it may be a step's pass."""
        self._called = None
        recomputed = torch._C._current_graph_task_id() != -1  # in backward(), by checkpoint
        training = any(m.training for m in module.modules())
        if recomputed or not training or not torch.is_grad_enabled():
            return
        if self._phase is not None:
            return self._replay()
        weights = [w for group in self.param_groups for w in group["params"]]
        if all(w.grad is None for w in weights):
            self._forget()
        if any(w.requires_grad for w in weights):
            self._called = self._snapshot()

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """A pass belongs to the step if a gradient comes back to its output; the first counts."""
        called, self._called = self._called, None
        if called is None:
            return
        hook = _Hook(self, "_arrived", called)
        outputs = [y for y in tree_leaves(output) if isinstance(y, Tensor) and y.grad_fn]
        # Of a view its base: if it is changed in place, its own node leaves the graph.
        nodes = {(y if y._base is None else y._base).grad_fn or y.grad_fn for y in outputs}
        for node in nodes:
            node.register_prehook(hook)  # type: ignore[union-attr]
        if not nodes:  # it returns what cannot be looked into
            self._arrived(called)

    def _arrived(self, called: "_Snapshot", *_: Any) -> None:
        if self._phase is None and (self._before is None or called.number < self._before.number):
            self._before = called

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


def _check_settings(rho: float, p: float, adaptive: bool, eta: float) -> None:
    check_ball(rho, p, eta)
    if not isinstance(adaptive, bool):
        raise ValueError(f"adaptive must be True or False, got {adaptive!r}")


def _forget_casts() -> None:
    """Where autocast surrounds both passes, it keeps the weights of the first in low precision."""
    torch.clear_autocast_cache()


_numbers = itertools.count()


class _Snapshot:
    """The random numbers to come, and the buffers: which tensors they are, and their values."""

    def __init__(self, devices: set[torch.device], model: nn.Module | None) -> None:
        self.number = next(_numbers)
        self.random = torch.get_rng_state()
        self.on_devices = {
            d: torch.get_device_module(d).get_rng_state(*_index(d))
            for d in devices
            if d.type not in ("cpu", "meta")
        }
        modules = () if model is None else model.modules()
        self.bound = [(m._buffers, name, b) for m in modules for name, b in m._buffers.items()]
        local = lambda b: b.to_local() if hasattr(b, "placements") else b
        self.buffers = [local(b) for _, _, b in self.bound if b is not None and _can_change(b)]
        self.copies = [torch.empty_like(b) for b in self.buffers]
        self._copy(self.copies, self.buffers)

    @torch.no_grad()
    def restore(self) -> None:
        torch.set_rng_state(self.random)
        for device, state in self.on_devices.items():
            torch.get_device_module(device).set_rng_state(state, *_index(device))
        for buffers, name, b in self.bound:
            buffers[name] = b
        for b, copy in zip(self.buffers, self.copies, strict=True):
            if b.shape != copy.shape:
                b.resize_(copy.shape)
        self._copy(self.buffers, self.copies)

    @torch.no_grad()
    def _copy(self, to: list[Tensor], values: list[Tensor]) -> None:
        if to:
            torch._foreach_copy_(to, values)


def _can_change(b: Tensor) -> bool:
    """In place, that is; a lazy one has no values, an expanded one shares them."""
    if is_lazy(b) or b.is_inference():
        return False
    return b.layout is not torch.strided or 0 not in b.stride() or b.numel() <= 1


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)


class _Hook:
    """Calls a method of SAM while there is one; in a copy of what it hangs on, nothing."""

    def __init__(self, owner: SAM | None = None, method: str = "", *args: Any) -> None:
        self.owner = weakref.ref(owner) if owner is not None else lambda: None
        self.method, self.args = method, args

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        owner = self.owner()
        if owner is not None:
            getattr(owner, self.method)(*self.args, *args)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Hook, ()
