"""llama_jax: LLaMA training in JAX and Flax, from a laptop to a pod.

Importing the package starts no device, opens no file and imports no TensorFlow.
"""

__version__ = "0.1.0"
