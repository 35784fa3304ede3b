"""What a run trains and what it keeps frozen: all parameters, or adapters above a frozen base."""

import functools
from typing import Any

import jax

from llama_jax.config import Config
from llama_jax.model.llama import init_params
from llama_jax.model.lora import Adapted, abstract_base, init_adapters


def init_trained(config: Config, key: jax.Array) -> Any:
    """Random values of what the run trains, float32; the same bits on every mesh."""
    if config.lora.rank:
        return init_adapters(config.model, config.lora, key)
    return init_params(config.model, key)


def abstract_trained(config: Config) -> Any:
    """Shapes and dtypes of what the run trains; allocates nothing."""
    return jax.eval_shape(functools.partial(init_trained, config), jax.random.key(0))


def abstract_frozen(config: Config) -> Any:
    """Shapes and dtypes of the base below adapters; None where all weights are trained."""
    if not config.lora.rank:
        return None
    params = jax.eval_shape(functools.partial(init_params, config.model), jax.random.key(0))
    return abstract_base(params, config.lora)


def combined(trained: Any, frozen: Any, config: Config) -> Any:
    """What `llama.forward` takes: the trained parameters, or the base with its adapters."""
    return Adapted(frozen, trained, config.lora) if config.lora.rank else trained
