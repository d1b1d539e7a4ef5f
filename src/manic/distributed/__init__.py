"""What the ranks of a group hold, and what they say to each other outside of a step's all_reduce."""
