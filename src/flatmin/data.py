"""Data for training, validation and test, whole and in memory."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ._checks import tensor, whole

__all__ = ["Data"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Data:
    """A data set, split into training, validation and test parts.

    :meth:`of` makes one from tensors of your own.

    Parameters
    ----------
    name : str
        Name of the data set.
    num_classes : int or None
        Number of classes K; ``None`` if the targets are no classes.
    x_train, x_validation, x_test : Tensor, shape [n, ...]
        Inputs; shape after the first dimension and type are the same in all three.  The validation
        and test parts may have 0 rows.
    y_train, y_validation, y_test : Tensor, shape [n, ...]
        Targets as the criterion takes them.  Classes are int64 in 0 … K−1; those of the first two
        parts may be noisy, those of the test part are clean.
    y_train_clean, y_validation_clean : Tensor
        The targets before noise.

    Raises
    ------
    TypeError, ValueError
        If the fields do not fit together; the message names the field.

    Examples
    --------
    >>> from flatmin.book import two_gaussians
    >>> data = two_gaussians(train_size=50, label_noise=0.1)
    >>> data
    Data('two_gaussians', 2 classes, inputs [10], 50 train (5 noisy), 100 validation, 20000 test)
    >>> x, y = data.split("validation_clean")
    >>> x.shape, y.shape
    (torch.Size([100, 10]), torch.Size([100]))
    """

    name: str
    num_classes: int | None
    x_train: Tensor
    y_train: Tensor
    x_validation: Tensor
    y_validation: Tensor
    x_test: Tensor
    y_test: Tensor
    y_train_clean: Tensor
    y_validation_clean: Tensor

    @classmethod
    def of(
        cls,
        x: Tensor,
        y: Tensor,
        validation: tuple[Tensor, Tensor] | None = None,
        test: tuple[Tensor, Tensor] | None = None,
        *,
        num_classes: int | None = None,
        name: str = "data",
    ) -> Data:
        """A data set of your own: any inputs, any targets that the criterion takes.

        Parameters
        ----------
        x, y : Tensor [n, ...]
            The training set.  It is kept, not copied: what changes these tensors in place changes
            the data.
        validation, test : (x, y), optional
            Parts with the same shapes; without them there is nothing to evaluate there.
        num_classes : int, optional
            K, if the targets are classes.  Found out if ``y`` is int64 of shape [n]; else ``None``.
        name : str
            The set's name.

        Examples
        --------
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> Data.of(x, x.sin(), test=(x, x.sin()), name="sine")
        Data('sine', inputs [1], targets [1], 20 train, 0 validation, 20 test)
        """
        parts = {"x and y": (x, y), "validation": validation, "test": test}
        for what, part in parts.items():
            pair = isinstance(part, tuple | list) and len(part) == 2
            tensors = pair and all(isinstance(t, Tensor) and t.ndim for t in part or ())
            if part is not None and not tensors:
                got = [type(t).__name__ for t in part] if pair else type(part).__name__
                raise TypeError(
                    f"{what} must be two tensors [n, ...], got {got}; torch.as_tensor makes them"
                )
        (x_v, y_v), (x_t, y_t) = (part or (x[:0], y[:0]) for part in (validation, test))
        if num_classes is None and y.dtype == torch.int64 and y.ndim == 1 and len(y):
            num_classes = max(2, 1 + max(int(part.max()) for part in (y, y_v, y_t) if len(part)))
        clean = y.clone(), y_v.clone()  # so that noise added to y_train in place is noise
        return cls(name, num_classes, x, y, x_v, y_v, x_t, y_t, *clean)

    def __post_init__(self) -> None:
        if self.num_classes is not None:
            whole("num_classes", self.num_classes, 2)
        for field in dataclasses.fields(self)[2:]:
            value = getattr(self, field.name)
            tensor(field.name, value)
        for x_name, y_name in _SPLITS.values():
            x, y = getattr(self, x_name), getattr(self, y_name)
            self._check_like_training(x_name, x, self.x_train, "inputs", "x_train")
            self._check_like_training(y_name, y, self.y_train, "targets", "y_train")
            if y.shape[:1] != x.shape[:1]:
                raise ValueError(
                    f"{y_name} must have one row for each of the {len(x)} of {x_name}, "
                    f"got shape {list(y.shape)}"
                )
            if self.num_classes is not None:
                self._check_classes(y_name, y, self.num_classes)

    def _check_like_training(self, name: str, t: Tensor, first: Tensor, what: str, of: str) -> None:
        if t.ndim < 1:
            raise ValueError(f"{name} must be of shape [n, ...], got a single number")
        if t.shape[1:] != first.shape[1:] or t.dtype != first.dtype:
            raise ValueError(
                f"{name} must have {what} of shape {list(first.shape[1:])} and type {first.dtype} "
                f"like {of}, got {list(t.shape[1:])} and {t.dtype}"
            )

    def _check_classes(self, name: str, y: Tensor, k: int) -> None:
        if y.dtype != torch.int64:
            raise ValueError(f"{name} must be int64 where num_classes is {k}, got {y.dtype}")
        if y.numel() and not (0 <= int(y.min()) and int(y.max()) < k):
            raise ValueError(
                f"{name} must be in 0 … {k - 1} (num_classes = {k}), "
                f"got {int(y.min())} … {int(y.max())}"
            )

    def __repr__(self) -> str:
        changed = self.y_train != self.y_train_clean
        noisy = int(changed.reshape(len(changed), -1).any(1).sum()) if len(changed) else 0
        classes = self.num_classes
        targets = f"targets {list(self.y_train.shape[1:])}" if classes is None else ""
        return (
            f"Data({self.name!r}, {f'{classes} classes, ' if classes else ''}"
            f"inputs {list(self.x_train.shape[1:])}, {targets and targets + ', '}"
            f"{len(self.x_train)} train"
            f"{f' ({noisy} noisy)' if noisy else ''}, {len(self.x_validation)} validation, "
            f"{len(self.x_test)} test)"
        )

    def to(self, device: torch.device | str) -> Data:
        """The same data on another device."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[2:]}
        return dataclasses.replace(self, **{k: v.to(device) for k, v in tensors.items()})

    def split(self, name: str) -> tuple[Tensor, Tensor]:
        """Inputs and labels of one part.

        Parameters
        ----------
        name : {"train", "train_clean", "validation", "validation_clean", "test"}
            Which part; ``_clean`` means with the labels before noise.
        """
        if name not in _SPLITS:
            raise ValueError(f"name must be one of {', '.join(_SPLITS)}, got {name!r}")
        x, y = _SPLITS[name]
        return getattr(self, x), getattr(self, y)


_SPLITS = {
    "train": ("x_train", "y_train"),
    "train_clean": ("x_train", "y_train_clean"),
    "validation": ("x_validation", "y_validation"),
    "validation_clean": ("x_validation", "y_validation_clean"),
    "test": ("x_test", "y_test"),
}
