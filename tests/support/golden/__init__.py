"""Problems and optax's results on them."""
