"""`ssm-dist kernels`: the kernel benchmark."""

from ssm_dist.kernel_benchmark.program import main as run

__all__ = ["run"]
