"""How the scale is learned: pure functions of a small state and a few sums, one file for each rule."""
