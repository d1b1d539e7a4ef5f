"""The layout of the model over the ranks, and all communication besides the step's all_reduce."""
