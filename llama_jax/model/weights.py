"""The parameters that a run trains and those that it keeps frozen.

A run trains all parameters, or adapters on a frozen base.
"""

import functools
from typing import Any

import jax

from llama_jax.config import Config
from llama_jax.model.llama import LLAMA, Architecture, Variant, init_params
from llama_jax.model.lora import Adapted, abstract_base, init_adapters
from llama_jax.parameters import abstract


def init_trained(config: Config, key: jax.Array, architecture: Architecture = LLAMA) -> Any:
    """Makes random initial values of the trained parameters, float32, the same bits on every mesh.

    Args:
      config: config of the run.
      key: the key of the random numbers.
      architecture: architecture of the model.
    """
    if config.lora.rank:
        return init_adapters(config.model, config.lora, key, architecture.parameters)
    return init_params(config.model, key, architecture)


def abstract_trained(config: Config, architecture: Architecture = LLAMA) -> Any:
    """Returns shapes and dtypes of what the run trains; allocates nothing."""
    rows = architecture.parameters
    if not config.lora.rank:
        return abstract(config.model, rows)
    init = functools.partial(init_adapters, config.model, config.lora, rows=rows)
    return jax.eval_shape(init, jax.random.key(0))


def abstract_frozen(config: Config, architecture: Architecture = LLAMA) -> Any:
    """Returns shapes and dtypes of the base of adapters; None if all weights are trained."""
    if not config.lora.rank:
        return None
    rows = architecture.parameters
    return abstract_base(abstract(config.model, rows), config.lora, rows)


def combined(trained: Any, frozen: Any, config: Config, architecture: Architecture = LLAMA) -> Any:
    """Returns the parameters in the form that `llama.forward` takes.

    Args:
      trained: the trained parameters or adapters.
      frozen: the base of the adapters; None if the run trains all weights.
      config: config of the run.
      architecture: architecture of the model.

    Returns:
      Plain parameters or `Adapted`; both inside a `Variant` for an architecture other than `LLAMA`.
    """
    weights = Adapted(frozen, trained, config.lora) if config.lora.rank else trained
    return weights if architecture is LLAMA else Variant(weights, architecture)
