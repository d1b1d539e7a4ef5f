"""What torch and its checkpointing expect of an optimizer that wraps others."""
