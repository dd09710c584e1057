"""A gradient penalty for a training loop of your own."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._ball import length
from .._checks import hyperparameter, tensor

__all__ = ["gradient_penalty"]

# The kernels whose second derivative PyTorch lacks, or has wrong.
TWICE = {
    "WeightNormInterface": "write the weight as g * v / v.norm(dim=1, keepdim=True)",
    "ScaledDotProduct": "compute it in torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
    "CudnnRnn": "compute it in torch.backends.cudnn.flags(enabled=False)",
    "CompiledFunction": "compute it with the model that was compiled, model._orig_mod",
    "CheckpointFunction": "call checkpoint(..., use_reentrant=False)",
    "EmbeddingBag": "use Embedding, and sum or average its rows",
    "Cdist": "compute the distances as (x[:, None] - y).norm(dim=-1)",
    "Pdist": "compute the distances as (x[:, None] - x).norm(dim=-1)",
}
ONCE = once_differentiable(lambda ctx: None).__code__


def gradient_penalty(
    loss: Tensor,
    parameters: Tensor | Iterable[Tensor],
    penalty: float | Tensor,
    squared: bool = True,
) -> Tensor:
    r"""The penalty itself, for a training loop of your own: add it to the loss.

    .. math:: \tfrac\lambda2\|\nabla L\|^2 \quad\text{or}\quad \lambda\|\nabla L\|

    Its ``backward`` differentiates through the gradient, so it costs about two more passes.

    Parameters
    ----------
    loss : Tensor
        One number, with its graph.
    parameters : Tensor or iterable of Tensor
        With respect to which the gradient is taken; those that require none, or that the loss
        does not depend on, count as zero, one that is named twice counts once.
    penalty : float or Tensor
        The weight :math:`\lambda\ge0`.
    squared : bool
        As in :class:`flatmin.gradient.GradientPenalty`.

    Raises
    ------
    ValueError
        If the loss comes from a kernel that cannot be differentiated twice, or (weight norm) only
        wrongly; the message names a kernel that can.  If it depends on none of the parameters.

    Returns
    -------
    Tensor
        One number, differentiable; in at least float32, also under autocast.

    Examples
    --------
    >>> w = torch.tensor(2.0, requires_grad=True)
    >>> loss = 0.5 * 3.0 * w**2
    >>> (loss + gradient_penalty(loss, [w], 0.1)).backward()
    >>> w.grad
    tensor(7.8000)
    """
    hyperparameter("penalty", penalty, 0)
    if tensor("loss", loss).ndim:
        raise ValueError(f"loss must be one number, got shape {tuple(loss.shape)}")
    if loss.grad_fn is None and not loss.requires_grad:
        raise ValueError("loss must have a graph, got one that is detached or without a gradient")
    alone = isinstance(parameters, Tensor) or not isinstance(parameters, Iterable)
    of: list[Any] = [parameters] if alone else list(dict.fromkeys(parameters))
    for w in of:
        if not isinstance(w, Tensor) or w.is_complex():
            got = w.dtype if isinstance(w, Tensor) else type(w).__name__
            raise TypeError(
                f"parameters must be real tensors, such as model.parameters(), got {got}"
            )
    weights = [w for w in of if w.requires_grad]
    for node in _graph(loss.grad_fn):
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        if getattr(backward, "__code__", None) is ONCE:
            raise ValueError(
                f"loss must be twice differentiable, got one with {node.name()}: remove its "
                "once_differentiable, if its backward() can itself be differentiated"
            )
        for kernel, way_out in TWICE.items():
            if node.name().startswith(kernel):
                raise ValueError(
                    f"loss must be twice differentiable, got one with {node.name()}: {way_out}"
                )
    gradients = (
        torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True) if weights else ()
    )
    grads = [g.to_dense().flatten() for g in gradients if g is not None]
    if not grads:
        raise ValueError(
            "parameters must include one that requires a gradient and that the loss depends on, "
            "got none"
        )
    g = torch.cat(grads)
    g = g.to(torch.promote_types(g.dtype, torch.float32))
    # Not g @ g, which autocast would compute in half precision.
    return penalty / 2 * g.square().sum() if squared else penalty * length(g)


def _graph(root: Any) -> Iterator[Any]:
    """All nodes of an autograd graph, each once."""
    seen, ahead = {root, None}, [root] if root is not None else []
    while ahead:
        node = ahead.pop()
        yield node
        new = {following for following, _ in node.next_functions} - seen
        seen |= new
        ahead += new
