"""Parts of launch/train.py: data, model, optimizers, parallelism and reports."""
