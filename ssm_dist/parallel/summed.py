"""A parameter whose product is summed over ranks, for modules that use it directly in their forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

_KEEPING = {"__getitem__", "unsqueeze", "detach", "requires_grad_"}
_PRODUCTS = {"matmul", "__matmul__"}


class SummedProduct(Tensor):
    """A tensor W of which W @ x is reduced, also through W[:, None]; any other use gives plain tensors."""

    reduce: Callable[[Tensor], Tensor]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if not isinstance(result, cls):
            return result
        left = args[0] if args and isinstance(args[0], cls) else None
        if left is not None and func.__name__ in _KEEPING:
            result.reduce = left.reduce
            return result
        plain = result.as_subclass(Tensor)
        return plain if left is None or func.__name__ not in _PRODUCTS else left.reduce(plain)


def summed_product(parameter: nn.Parameter, reduce: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """`parameter`, with `reduce` applied to the product whenever it stands on the left of `@`."""
    wrapped = parameter.data.as_subclass(SummedProduct)
    wrapped.reduce = reduce
    return nn.Parameter(wrapped, requires_grad=False)
