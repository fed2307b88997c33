"""`ssm-dist kernels`: every op against its floor, its definition and its peers."""
