"""Run ssm-dist from a checkout: `torchrun --nproc-per-node 2 infer.py --config configs/demo.toml`."""

import sys

from ssm_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
