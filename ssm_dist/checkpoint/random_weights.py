"""Random weights for models that are built without a checkpoint, the same at every degree.

Every element is a hash of (seed, path, its place in the whole parameter), so a rank computes its own slice
and nothing else, and a slice does not depend on how the parameter is sharded. The hash is integer arithmetic:
CPU and GPU give the same values too, except where exp and log enter (dt_proj.bias, A_log), in the last digit.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from ssm_dist.checkpoint.layouts import Shape
from ssm_dist.checkpoint.parameters import Held, held, replace_parameters
from ssm_dist.checkpoint.weights import parameter_dtype

_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}  # elements at a time: in cache, or enough to fill the device
_GOLDEN, _MIX_1, _MIX_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # splitmix64
_DT_MIN, _DT_MAX = 1e-3, 1e-1


def random_parameters(
    model: nn.Module, *, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> None:
    """Replace the meta parameters of `model` by random ones of the same placement, on `device`.

    The distributions keep activations at unit scale: fan-in scaled, near-normal weights (the last projection
    of each layer scaled down by the square root of the depth), embeddings of standard deviation 0.02, norms
    1; A_log = log(1..N), D = 1 and dt_proj.bias the inverse softplus of a log-uniform [1e-3, 1e-1], as in
    Mamba (arXiv 2312.00752, section 3.6). Dtypes are those of `load_parameters`.
    """
    parameters = dict(model.named_parameters())
    depth = len({path.split(".")[1] for path in parameters if path.startswith("layers.")})
    local = {}
    for path, parameter in parameters.items():
        part = held(parameter)
        tensor = torch.empty(part.local_shape, dtype=parameter_dtype(path, dtype), device=device)
        _fill(tensor, path, part, depth, seed)
        local[path] = tensor
    replace_parameters(model, local)


def _fill(tensor: Tensor, path: str, part: Held, depth: int, seed: int) -> None:
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    key = int.from_bytes(digest[:8], "little", signed=True)
    flat, step = tensor.view(-1), _CHUNK.get(tensor.device.type, 1 << 24)
    for first in range(0, flat.numel(), step):
        local = torch.arange(first, min(first + step, flat.numel()), device=tensor.device)
        flat[first : first + step] = _values(path, part.shape, depth, key, _places(part, local))


def _places(part: Held, local: Tensor) -> Tensor:
    """Where elements of the (flattened) part are in the (flattened) whole."""
    if part.dim is None:
        return local
    inner = math.prod(part.shape[part.dim + 1 :])
    mine, all_ranks = part.length * inner, part.shape[part.dim] * inner
    return local + (local // mine) * (all_ranks - mine) + part.start * inner


def _values(path: str, shape: Shape, depth: int, key: int, places: Tensor) -> Tensor:
    """The elements of a parameter at `places`, float32."""
    if path.endswith((".D", "norm.weight")):
        return torch.ones_like(places, dtype=torch.float32)
    if path.endswith(".A_log"):
        return torch.log(1.0 + places % shape[-1])
    if path.endswith("dt_proj.bias"):
        uniform = ((_hash(key, places) >> 40) & 0xFFFFFF).float() / (1 << 24)
        dt = torch.exp(math.log(_DT_MIN) + uniform * math.log(_DT_MAX / _DT_MIN))
        return dt + torch.log(-torch.expm1(-dt))
    if path.endswith(".bias"):
        return torch.zeros_like(places, dtype=torch.float32)
    return _normal(_hash(key, places), _scale(path, shape, depth))


def _scale(path: str, shape: Shape, depth: int) -> float:
    """The standard deviation of a weight."""
    if path in ("embedding.weight", "head.weight"):
        return 0.02
    fan_in = shape[-1]
    if path.endswith("x_proj.weight"):
        fan_in = shape[0]
    elif path.endswith("o_proj.weight"):
        fan_in = math.prod(shape[1:])
    elif path.endswith("out_proj.weight"):
        fan_in *= depth
    return 1 / math.sqrt(fan_in)


def _hash(key: int, places: Tensor) -> Tensor:
    """64 random bits each, int64: the splitmix64 generator (Steele, Lea, Flood, 2014) at any position."""
    z = places * _GOLDEN + key
    z ^= (z >> 30) & ((1 << 34) - 1)  # >> repeats the sign; the mask makes it a shift of unsigned numbers
    z *= _MIX_1
    z ^= (z >> 27) & ((1 << 37) - 1)
    z *= _MIX_2
    z ^= (z >> 31) & ((1 << 33) - 1)
    return z


def _normal(bits: Tensor, deviation: float) -> Tensor:
    """Nearly normal, of mean 0: the exact sum of the four 16-bit quarters (Irwin-Hall), rounded once."""
    total = (bits & 0xFFFF) + ((bits >> 16) & 0xFFFF) + ((bits >> 32) & 0xFFFF) + ((bits >> 48) & 0xFFFF)
    return (total - 2 * 0xFFFF).float() * (deviation / math.sqrt((2**32 - 1) / 3))
