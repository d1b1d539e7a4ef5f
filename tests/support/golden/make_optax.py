"""Write optax.json beside this file: optax's Mechanic on the problems, in float64. Needs jax and optax.

PYTHONPATH=tests python -m support.golden.make_optax
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
import optax.contrib  # noqa: E402

from support.golden.problems import BASES, PROBLEMS, STEPS, data, start  # noqa: E402


def loss(problem: str, p: dict[str, Any], x: Any, y: Any) -> Any:
    if problem == "network":
        return jnp.mean((jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] - y) ** 2)
    out = x @ p["w"] + p["b"]
    if problem == "logistic":
        return jnp.mean(jnp.log1p(jnp.exp(-jnp.where(y > 0, 1.0, -1.0) * out)))
    return jnp.mean((out - y) ** 2)


def base_optimizer(name: str) -> Any:
    schedule = lambda count: 0.5 * (1.0 + jnp.cos(jnp.pi * count / STEPS))  # noqa: E731
    return {
        "sgd": lambda: optax.sgd(1.0),
        "momentum": lambda: optax.sgd(1.0, momentum=0.9),
        "adamw": lambda: optax.adamw(1.0, weight_decay=0.1),
        "adamw_cosine": lambda: optax.adamw(schedule, weight_decay=0.1),
    }[name]()


def trajectory(problem: str, base: str) -> dict[str, Any]:
    x, y = map(jnp.asarray, data())
    params = {name: jnp.asarray(value) for name, value in start(problem).items()}
    optimizer = optax.contrib.mechanize(base_optimizer(base))
    state = optimizer.init(params)
    gradient = jax.jit(jax.grad(lambda p: loss(problem, p, x, y)))
    update = jax.jit(optimizer.update)
    scales, norms = [], []
    for _ in range(STEPS):
        updates, state = update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        scales.append(float(jnp.sum(state.s)))
        norms.append(float(optax.tree.norm(params)))
    return {"scale": scales, "param_norm": norms, "final": {k: v.ravel().tolist() for k, v in params.items()}}


if __name__ == "__main__":
    result = {"optax": optax.__version__, "jax": jax.__version__}
    for problem in PROBLEMS:
        for base in BASES:
            result[f"{problem}/{base}"] = trajectory(problem, base)
    Path(__file__).with_name("optax.json").write_text(json.dumps(result, indent=1) + "\n")
