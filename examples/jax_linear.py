"""LLM.int8() in JAX: quantize a weight, run the layer under jit, and take gradients through it.

Run: python examples/jax_linear.py
"""

import jax
import jax.numpy as jnp
from octavo import jax as octavo_jax

tokens, in_features, out_features, outlier = 16, 512, 256, 17
keys = jax.random.split(jax.random.key(0), 2)
x = jax.random.normal(keys[0], (tokens, in_features)).at[:, outlier].multiply(40)
w = jax.random.normal(keys[1], (out_features, in_features)) / in_features**0.5

weight = octavo_jax.quantize_weight(w, outlier_columns=jnp.asarray([outlier], jnp.int32))  # a pytree
y = jax.jit(octavo_jax.linear)(x, weight)
gradient = jax.jit(jax.grad(lambda x: octavo_jax.linear(x, weight).sum()))(x)

error = float(jnp.linalg.norm(y - x @ w.T) / jnp.linalg.norm(x @ w.T))
error_of_gradient = float(jnp.linalg.norm(gradient - w.sum(0)) / jnp.linalg.norm(gradient))
print(f"relative error {error:.3g}, of the gradient {error_of_gradient:.3g}")
# Codes hold 7 bits and a sign: of two factors each is off by some 0.005 of its row's largest value.
assert error < 0.02
assert error_of_gradient < 0.02
