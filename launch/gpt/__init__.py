"""What launch/train.py is made of: data, model, optimizers, the ways to spread a model over ranks, and reports."""
