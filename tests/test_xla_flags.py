"""Presets of compiler flags, handed to the real compilers."""

import os
import subprocess
import sys

import pytest

from llama_jax.errors import UserError
from llama_jax.xla_flags import PRESETS, deterministic, use_preset
from tests.helpers import ROOT

GPU = [name for name, preset in PRESETS.items() if preset.variable == "XLA_FLAGS"]
TPU = {"v4": "v4:2x2x2", "v5e": "v5e:4x4", "v5p": "v5p:2x2x2", "v6e": "v6e:4x4"}
TPU["v6e-offload"] = TPU["v6e"]


def run(code, **environment):
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )


def test_the_users_own_settings_win():
    env = {
        "XLA_FLAGS": "--xla_gpu_enable_while_loop_double_buffering=false --xla_dump_to=x",
        "CUDA_DEVICE_MAX_CONNECTIONS": "8",
    }
    use_preset("hopper", env)
    flags = env["XLA_FLAGS"].split()
    assert flags[-2:] == ["--xla_gpu_enable_while_loop_double_buffering=false", "--xla_dump_to=x"]
    assert "--xla_gpu_enable_while_loop_double_buffering=true" not in flags
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in flags
    assert env["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
    assert env["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.9"


def test_tpu_flags_go_to_libtpu_alone():
    env = {"LIBTPU_INIT_ARGS": " --xla_tpu_use_enhanced_launch_barrier=true"}  # as JAX leaves it
    use_preset("v6e", env)
    assert list(env) == ["LIBTPU_INIT_ARGS"]
    assert env["LIBTPU_INIT_ARGS"].split() == [
        *PRESETS["v6e"].flags(),
        "--xla_tpu_use_enhanced_launch_barrier=true",
    ]


def test_no_preset_changes_nothing():
    env = {}
    use_preset("none", env)
    assert env == {}


@pytest.mark.parametrize("name", ["deterministic_ops", "exclude_nondeterministic_ops"])
def test_who_asks_for_the_same_bits(name):
    for value, asked in (
        ("", True),
        ("=true", True),
        ("=1", True),
        ("=false", False),
        ("x", False),
    ):
        flags = f"--xla_dump_to=x --xla_gpu_{name}{value} --xla_y=1"
        assert deterministic({"XLA_FLAGS": flags}) is asked
    assert not deterministic({})


def test_unknown_preset():
    with pytest.raises(UserError, match=r"no XLA preset 'hoper' among none, v4, .*'hopper'\?"):
        use_preset("hoper", {})


def test_every_setting_has_its_reason_and_source_once():
    for name, preset in PRESETS.items():
        names = [one.name for one in preset.settings]
        assert len(set(names)) == len(names), name
        assert all(one.reason and one.source for one in preset.settings), name


@pytest.mark.parametrize("name", GPU)
def test_this_jaxlib_knows_the_flags(name):
    # Set as train sets them: after JAX is imported, before a backend starts.
    code = f"import jax; from llama_jax.xla_flags import use_preset; use_preset({name!r})"
    process = run(f"{code}; print(jax.jit(lambda x: x + 1)(1))")
    assert process.returncode == 0, process.stderr
    assert process.stdout == "2\n"


def test_xla_aborts_on_a_flag_that_it_does_not_know():
    """What the test above rests on."""
    code = "import jax, os; os.environ['XLA_FLAGS'] = '--xla_gpu_graph_level=0'; jax.devices()"
    process = run(code)
    assert process.returncode != 0
    assert "Unknown flag in XLA_FLAGS: --xla_gpu_graph_level=0" in process.stderr


COMPILE = """
import os, sys
import jax, jax.numpy as jnp
from llama_jax.plan import parse_topology, topology_devices
from llama_jax.xla_flags import use_preset
use_preset(sys.argv[1]) if sys.argv[1] else os.environ.update(LIBTPU_INIT_ARGS='--xla_tpu_no=1')
devices = topology_devices(parse_topology(sys.argv[2]))
mesh = jax.sharding.Mesh(devices, ('x',))
place = jax.sharding.NamedSharding(mesh, jax.P('x'))
x = jax.ShapeDtypeStruct((len(devices) * 128, 256), jnp.bfloat16, sharding=place)
print(jax.jit(lambda x: (x @ x.T).sum()).lower(x).compile().cost_analysis()['flops'] > 0)
"""


def compile_for_tpu(preset, topology):
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", COMPILE, preset, topology],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.tpu
@pytest.mark.parametrize("name", [name for name in PRESETS if name not in GPU])
def test_the_tpu_compiler_knows_the_flags(name):
    process = compile_for_tpu(name, TPU[name])
    assert process.returncode == 0 and process.stdout == "True\n", process.stderr


@pytest.mark.tpu
def test_the_tpu_compiler_aborts_on_a_flag_that_it_does_not_know():
    assert compile_for_tpu("", "v5p:2x2x2").returncode != 0
