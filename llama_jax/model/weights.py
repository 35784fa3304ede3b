"""What a run trains and what it keeps frozen: all parameters, or adapters above a frozen base."""

import functools
from typing import Any

import jax

from llama_jax.config import Config
from llama_jax.model.llama import LLAMA, Architecture, Variant, init_params
from llama_jax.model.lora import Adapted, abstract_base, init_adapters


def init_trained(config: Config, key: jax.Array, architecture: Architecture = LLAMA) -> Any:
    """Makes random values of what the run trains, float32; the same bits on every mesh.

    Args:
      config: of the run.
      key: selects the numbers.
      architecture: of the model.
    """
    if config.lora.rank:
        return init_adapters(config.model, config.lora, key, architecture.parameters)
    return init_params(config.model, key, architecture)


def abstract_trained(config: Config, architecture: Architecture = LLAMA) -> Any:
    """Returns shapes and dtypes of what the run trains; allocates nothing."""
    init = functools.partial(init_trained, config, architecture=architecture)
    return jax.eval_shape(init, jax.random.key(0))


def abstract_frozen(config: Config, architecture: Architecture = LLAMA) -> Any:
    """Returns shapes and dtypes of the base below adapters; None where all weights are trained."""
    if not config.lora.rank:
        return None
    init = functools.partial(init_params, config.model, architecture=architecture)
    params = jax.eval_shape(init, jax.random.key(0))
    return abstract_base(params, config.lora, architecture.parameters)


def combined(trained: Any, frozen: Any, config: Config, architecture: Architecture = LLAMA) -> Any:
    """Returns what `llama.forward` takes: the trained parameters, or the base with its adapters.

    Args:
      trained: what the run trains.
      frozen: the base below adapters, or None.
      config: of the run.
      architecture: of the model.
    """
    weights = Adapted(frozen, trained, config.lora) if config.lora.rank else trained
    return weights if architecture is LLAMA else Variant(weights, architecture)
