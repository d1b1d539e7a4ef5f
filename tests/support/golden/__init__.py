"""Problems that optax was run on, and what came of it."""
