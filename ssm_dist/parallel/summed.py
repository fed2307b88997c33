"""A parameter whose product is summed over ranks, for modules that use it directly in their forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

_PRODUCTS = {"matmul", "__matmul__"}


class SummedProduct(Tensor):
    """A parameter W of which W @ x is reduced; so is the product of what is made of W, as W[:, None]."""

    reduce: Callable[[Tensor], Tensor]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        return summed_product(self.clone(), self.reduce)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if not isinstance(result, cls):
            return result
        left = args[0] if args and isinstance(args[0], cls) else None
        if left is None:
            return result.as_subclass(Tensor)
        if func.__name__ in _PRODUCTS:
            return left.reduce(result.as_subclass(Tensor))
        result.reduce = left.reduce
        return result


def summed_product(parameter: Tensor, reduce: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """`parameter`, with `reduce` applied to the product whenever it stands on the left of `@`."""
    wrapped = parameter.data.as_subclass(SummedProduct)
    wrapped.reduce = reduce
    return nn.Parameter(wrapped, requires_grad=False)
