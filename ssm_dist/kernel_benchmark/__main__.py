"""`python -m ssm_dist.kernel_benchmark`."""

import sys

from ssm_dist.errors import UserError
from ssm_dist.kernel_benchmark.program import main

try:
    main()
except UserError as error:
    sys.exit(f"error: {error}")
