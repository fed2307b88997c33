"""`python -m ssm_dist.kernel_benchmark`: every op against its floor, its definition and its peers."""
