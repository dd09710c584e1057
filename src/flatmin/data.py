"""Data for training, validation and test, whole and in memory."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ._checks import whole

__all__ = ["Data"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Data:
    """A classification data set, split into training, validation and test parts.

    Parameters
    ----------
    name : str
        Name of the data set.
    num_classes : int
        Number of classes K.
    x_train, x_validation, x_test : Tensor, shape [n, ...], floating point
        Inputs; the shape after the first dimension is the same in all three. The validation part
        may have 0 rows.
    y_train, y_validation : Tensor, shape [n], int64
        Labels in 0 … K−1, possibly noisy.
    y_test : Tensor, shape [n], int64
        Labels of the test part, always clean.
    y_train_clean, y_validation_clean : Tensor, shape [n], int64
        The labels before noise.

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
    num_classes: int
    x_train: Tensor
    y_train: Tensor
    x_validation: Tensor
    y_validation: Tensor
    x_test: Tensor
    y_test: Tensor
    y_train_clean: Tensor
    y_validation_clean: Tensor

    def __post_init__(self) -> None:
        whole("num_classes", self.num_classes, 2)
        for field in dataclasses.fields(self)[2:]:
            value = getattr(self, field.name)
            if not isinstance(value, Tensor):
                raise TypeError(f"{field.name} must be a tensor, got {type(value).__name__}")
        for x_name, y_name in _SPLITS.values():
            x, y = getattr(self, x_name), getattr(self, y_name)
            if x.ndim < 2 or not x.is_floating_point():
                raise ValueError(
                    f"{x_name} must be floating point of shape [n, ...], "
                    f"got {x.dtype} of shape {list(x.shape)}"
                )
            if x.shape[1:] != self.x_train.shape[1:]:
                raise ValueError(
                    f"{x_name} must have inputs of shape {list(self.x_train.shape[1:])} "
                    f"like x_train, got {list(x.shape[1:])}"
                )
            if y.dtype != torch.int64 or y.shape != x.shape[:1]:
                raise ValueError(
                    f"{y_name} must be int64 of shape [{len(x)}] like {x_name}, "
                    f"got {y.dtype} of shape {list(y.shape)}"
                )
            if len(y) and not (0 <= int(y.min()) and int(y.max()) < self.num_classes):
                raise ValueError(
                    f"{y_name} must be in 0 … {self.num_classes - 1} (num_classes = "
                    f"{self.num_classes}), got {int(y.min())} … {int(y.max())}"
                )

    def __repr__(self) -> str:
        noisy = int((self.y_train != self.y_train_clean).sum())
        return (
            f"Data({self.name!r}, {self.num_classes} classes, "
            f"inputs {list(self.x_train.shape[1:])}, {len(self.x_train)} train"
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
