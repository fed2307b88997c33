"""Zamba: heads of the mixer and of the attention split over ranks.

x_proj reduces within the ranks that share a Mamba head: nobody at degree 2, pairs at 4. The linear that
follows the shared block stays whole and works on the block's partial sum: one reduction, at the layer's norm,
instead of two.
"""

from ssm_dist.parallel.plan import Plan
from ssm_dist.parallel.plans.mamba import MAMBA_PLAN
from ssm_dist.parallel.styles import Colwise, ReduceAddNorm, Replicated, Rowwise

ZAMBA_PLAN: Plan = {
    **MAMBA_PLAN,
    "shared.input_norm": ReduceAddNorm(),
    "shared.attention.q_proj": Colwise(),
    "shared.attention.k_proj": Colwise(),
    "shared.attention.v_proj": Colwise(),
    "shared.attention.o_proj": Rowwise(before_norm=True),
    "shared.ff_norm": ReduceAddNorm(),
    "shared.mlp.gate_proj": Colwise(),
    "shared.mlp.up_proj": Colwise(),
    "shared.mlp.down_proj": Rowwise(),
    "layers.*.linear": Replicated(),
}
