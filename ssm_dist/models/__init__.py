"""Floor 2: the models, declared once, free of any parallelism."""
