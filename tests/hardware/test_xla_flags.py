"""Presets of compiler flags, and whether the real compilers accept them."""

import json
import os
import subprocess
import sys

import pytest

from llama_jax.errors import UserError
from llama_jax.hardware.chips import CHIPS
from llama_jax.hardware.local_tpu import libtpu_version, tpu_here
from llama_jax.hardware.xla_flags import HELP, NAMES, PRESETS, use_preset
from tests.helpers import ROOT, run_command

GPU = [name for name, preset in PRESETS.items() if preset.variable == "XLA_FLAGS"]
TPU = {"v4": "v4:2x2x2", "v5e": "v5e:4x4", "v5p": "v5p:2x2x2", "v6e": "v6e:4x4"}
TPU |= {"v5p-sparsecore": TPU["v5p"], "v6e-sparsecore": TPU["v6e"]}
TPU |= {"v6e-offload": TPU["v6e"], "tpu7x": "tpu7x:2x2x2"}
# The presets that `auto` chooses.
OLD, NEW = "0.0.42.1", "0.0.50.1"  # libtpu of JAX 0.10 and 0.12
DEFAULTS = {
    OLD: {chip: chip for chip in ("v4", "v5e", "v5p", "v6e", "tpu7x")},
    NEW: {
        **{"v4": "none", "v5e": "v5e", "tpu7x": "tpu7x"},
        **{"v5p": "v5p-sparsecore", "v6e": "v6e-sparsecore"},
    },
}


def run(code, *arguments):
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    env.pop("LIBTPU_INIT_ARGS", None)
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


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
    env = {"LIBTPU_INIT_ARGS": " --xla_tpu_use_enhanced_launch_barrier=true"}  # JAX sets this one
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


def test_unknown_preset():
    with pytest.raises(UserError, match=r"no XLA preset 'hoper' among none, v4, .*'hopper'\?"):
        use_preset("hoper", {})
    with pytest.raises(UserError, match=r", blackwell, auto; did you mean 'auto'\?"):
        use_preset("aut", {})


@pytest.mark.parametrize("libtpu", [OLD, NEW])
@pytest.mark.parametrize("chip", [chip.name for chip in CHIPS if chip.torus])
def test_auto_is_the_preset_of_the_tpu(chip, libtpu):
    env = {"LIBTPU_INIT_ARGS": "--mine=1"}
    chosen = use_preset("auto", env, chip, libtpu)
    assert chosen.preset == DEFAULTS[libtpu][chip] and chosen.tpu == chip
    flags = PRESETS[chosen.preset].flags()
    assert env == {"LIBTPU_INIT_ARGS": " ".join([*flags, "--mine=1"])}
    if flags:
        expected = f"preset {chosen.preset} ({len(flags)} flags; --xla_preset=none turns it off"
        if chosen.preset in ("v4", "v5p", "v6e"):
            expected += "; libtpu warns of its continuation fusion"
        if chosen.preset in ("v5p", "v6e"):
            expected += f", --xla_preset={chosen.preset}-sparsecore does not use it"
        expected += ")"
    else:
        expected = f"none, as this libtpu takes no preset for {chip}"
    assert str(chosen) == expected


def test_auto_for_a_tpu_of_the_future_sets_nothing():
    env = {}
    assert (
        str(use_preset("auto", env, "v9x", NEW)) == "none, as this libtpu takes no preset for v9x"
    )
    assert env == {}


@pytest.mark.parametrize("name", ["auto", "none"])
def test_nothing_is_set_without_a_tpu(name):
    env = {"JAX_PLATFORMS": "cpu", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_LIBRARY_PATH": __file__}
    before = dict(env)
    for tpu in ("", None):  # `plan` for a GPU, and this machine
        chosen = use_preset(name, env, tpu)
        assert (chosen.preset, chosen.tpu, str(chosen)) == ("none", "", "none")
        assert env == before


def test_what_is_said_where_the_environment_sets_some_flags():
    env = {"LIBTPU_INIT_ARGS": "--xla_enable_async_all_gather=false"}
    total = len(PRESETS["v5e"].flags())
    said = f"{total - 1} of {total} flags, the environment sets the others"
    assert str(use_preset("auto", dict(env), "v5e", NEW)) == (
        f"preset v5e ({said}; --xla_preset=none turns it off)"
    )
    assert str(use_preset("v5e", env)) == f"preset v5e ({said})"
    assert env["LIBTPU_INIT_ARGS"].endswith(" --xla_enable_async_all_gather=false")
    assert env["LIBTPU_INIT_ARGS"].count("--xla_enable_async_all_gather=") == 1


def test_a_preset_by_name_that_this_libtpu_refuses():
    for name in PRESETS:
        use_preset(name, {}, libtpu=OLD)
    for name in ("v4", "v5p", "v6e", "v6e-offload"):
        env = {}
        with pytest.raises(UserError, match=rf"libtpu 0.0.50.1 refuses .*--xla_preset={name}: "):
            use_preset(name, env, libtpu=NEW)
        assert env == {}


def test_no_all_reduce_is_fused_on_v4():
    """The fusion makes code generation fail: "Used 16.32M of 16.00M vmem"."""
    pair = {
        "--xla_enable_async_all_reduce=true",
        "--xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true",
    }
    having = {name for name, preset in PRESETS.items() if pair & set(preset.flags())}
    assert having == {"v5e", "v5p", "v6e", "v6e-offload"}
    assert all(pair <= set(PRESETS[name].flags()) for name in having)


def test_the_help_names_all():
    assert f": {', '.join(NAMES)}. auto: on a TPU" in HELP


# The chips of this machine.


def fake_bus(folder, *devices):
    """Writes a folder like /sys/bus/pci/devices, and returns its path."""
    for number, (vendor, device) in enumerate(devices):
        path = folder / f"0000:00:{number:02}.0"
        path.mkdir()
        (path / "vendor").write_text(f"{vendor}\n")
        (path / "device").write_text(f"{device}\n")
    return str(folder)


LIBTPU = {"TPU_LIBRARY_PATH": __file__}  # any file that exists
NETWORK_CARD = ("0x1ae0", "0x0042")


@pytest.mark.parametrize(
    ("device", "chip"),
    [
        ("0x005e", "v4"),
        ("0x0062", "v5p"),
        ("0x0063", "v5e"),
        ("0x006f", "v6e"),
        ("0x0076", "tpu7x"),
    ],
)
def test_the_chip_on_the_bus(tmp_path, device, chip):
    bus = fake_bus(tmp_path, ("0x10de", "0x2335"), NETWORK_CARD, ("0x1ae0", device))
    assert tpu_here(LIBTPU, bus) == chip
    # The bus wins over a variable that is left over from another machine.
    assert tpu_here({**LIBTPU, "TPU_ACCELERATOR_TYPE": "v2-8"}, bus) == chip


@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        ("v4-32", "v4"),
        ("v5litepod-16", "v5e"),
        ("v5p-128", "v5p"),
        ("v6e-8", "v6e"),
        ("tpu7x-64", "tpu7x"),
        ("tpu7x", "tpu7x"),
        ("", ""),
    ],
)
def test_the_chip_that_the_cloud_names(tmp_path, kind, chip):
    """A container may not show the bus."""
    env = {**LIBTPU, "TPU_ACCELERATOR_TYPE": kind}
    assert tpu_here(env, str(tmp_path / "missing")) == chip
    assert tpu_here(env, fake_bus(tmp_path, NETWORK_CARD, ("0x10de", "0x0062"))) == chip


@pytest.mark.parametrize(
    ("platforms", "chip"),
    [
        ("", "v5p"),
        ("tpu", "v5p"),
        ("tpu,cpu", "v5p"),
        ("cpu", ""),
        ("cpu,tpu", ""),  # JAX runs on the first platform
        ("cuda", ""),
    ],
)
def test_the_platform_that_is_asked_for(tmp_path, platforms, chip):
    bus = fake_bus(tmp_path, ("0x1ae0", "0x0062"))
    assert tpu_here({**LIBTPU, "JAX_PLATFORMS": platforms}, bus) == chip


def test_chips_without_their_library(tmp_path, monkeypatch):
    bus = fake_bus(tmp_path, ("0x1ae0", "0x0062"))
    env = {"TPU_LIBRARY_PATH": str(tmp_path / "missing")}
    for version, chip in (("", ""), (NEW, "v5p")):
        installed = "llama_jax.hardware.local_tpu.libtpu_version"
        monkeypatch.setattr(installed, lambda version=version: version)
        assert tpu_here(env, bus) == chip


def test_a_bus_that_cannot_be_read(tmp_path):
    bus = fake_bus(tmp_path, ("0x1ae0", "0x0062"))
    (tmp_path / "0000:00:00.0" / "device").write_bytes(b"\xff\xfe")
    (tmp_path / "0000:00:01.0" / "vendor").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    assert tpu_here(LIBTPU, bus) == ""


def test_a_machine_without_a_tpu_and_without_jax():
    """`auto` asks no backend: JAX is not even imported."""
    code = (
        "import os, sys; from llama_jax.hardware.xla_flags import use_preset;"
        "before = dict(os.environ);"
        "chosen = use_preset('auto');"
        "print(chosen, before == dict(os.environ), 'jax' in sys.modules)"
    )
    assert run(code).stdout == "none True False\n"


# The commands. They stop before they compile, so they need no libtpu.


COMMAND = """
import os, runpy, sys
import llama_jax.hardware.topology, llama_jax.hardware.xla_flags
from llama_jax.errors import UserError

def stop(topology):
    raise UserError(f"{topology}: {os.environ.get('LIBTPU_INIT_ARGS')}")

llama_jax.hardware.topology.topology_devices = stop
tpu, module, *sys.argv[1:] = sys.argv[1:]
llama_jax.hardware.xla_flags.libtpu_version = lambda: "0.0.42.1"
if tpu:
    llama_jax.hardware.xla_flags.tpu_here = lambda env: tpu
try:
    runpy.run_module(f"llama_jax.{module}", run_name="__main__", alter_sys=True)
finally:
    print("LIBTPU_INIT_ARGS:", os.environ.get("LIBTPU_INIT_ARGS"))
"""


def command(module, *flags, tpu=""):
    """Runs a command, as on a machine with this TPU, to the point where it would compile."""
    return run(COMMAND, tpu, module, "--config=configs/tiny.py", *flags)


@pytest.mark.parametrize(
    ("topology", "preset"),
    [
        ("v5p:2x2x1", "v5p"),
        ("h100:1x8", ""),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (
                *(("v4:2x2x1", "v4"), ("v5e:2x2", "v5e"), ("v6e:2x2", "v6e")),
                ("tpu7x:2x2x1", "tpu7x"),
            )
        ),
    ],
)
def test_plan_takes_the_preset_of_its_topology(topology, preset):
    # The TPU of this machine does not matter.
    process = command("plan", f"--topology={topology}", tpu="v2")
    flags = " ".join(PRESETS[preset].flags()) if preset else "None"
    assert process.stderr == f"error: {topology}: {flags}\n"


def test_plan_without_the_preset():
    process = command("plan", "--topology=v5p:2x2x1", "--xla_preset=none")
    assert process.stderr == "error: v5p:2x2x1: None\n"


# The mesh has more devices than this machine: training ends before it begins.
ENDS = ("--config.mesh.tensor=3", "--workdir=/nowhere")


def test_train_on_a_tpu_says_that_it_takes_the_preset():
    process = command("train", *ENDS, tpu="v5e")
    flags = PRESETS["v5e"].flags()
    assert process.stdout.splitlines() == [
        f"flags   preset v5e ({len(flags)} flags; --xla_preset=none turns it off)",
        f"LIBTPU_INIT_ARGS: {' '.join(flags)}",
    ]
    assert "does not cover 1 devices" in process.stderr


@pytest.mark.parametrize(("tpu", "flag"), [("", "auto"), ("v5e", "none")])
def test_train_without_a_tpu_or_a_preset_says_nothing(tpu, flag):
    process = command("train", *ENDS, f"--xla_preset={flag}", tpu=tpu)
    assert process.stdout == "LIBTPU_INIT_ARGS: None\n"
    assert "does not cover 1 devices" in process.stderr


def test_every_setting_has_its_reason_and_source_once():
    for name, preset in PRESETS.items():
        names = [one.name for one in preset.settings]
        assert len(set(names)) == len(names), name
        assert all(one.reason and one.source for one in preset.settings), name


@pytest.mark.parametrize("name", GPU)
def test_this_jaxlib_knows_the_flags(name):
    # The flags are set as train sets them: after JAX is imported, before a backend starts.
    code = f"import jax; from llama_jax.hardware.xla_flags import use_preset; use_preset({name!r})"
    process = run(f"{code}; print(jax.jit(lambda x: x + 1)(1))")
    assert process.returncode == 0, process.stderr
    assert process.stdout == "2\n"


def test_xla_aborts_on_a_flag_that_it_does_not_know():
    """The test above relies on this."""
    code = "import jax, os; os.environ['XLA_FLAGS'] = '--xla_gpu_graph_level=0'; jax.devices()"
    process = run(code)
    assert process.returncode != 0
    assert "Unknown flag in XLA_FLAGS: --xla_gpu_graph_level=0" in process.stderr


COMPILE = """
import os, sys
import jax, jax.numpy as jnp
from llama_jax.hardware.topology import parse_topology, topology_devices
from llama_jax.hardware.xla_flags import use_preset
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
    if PRESETS[name].refused(libtpu_version()):
        assert f"UserError: libtpu {libtpu_version()} refuses the flags" in process.stderr
    else:
        assert process.returncode == 0 and process.stdout == "True\n", process.stderr


@pytest.mark.tpu
def test_the_plan_names_its_preset():
    flags = ("--config=configs/tiny.py", "--topology=v5e:2x2", "--config.model.n_layers=1")
    said = "\nflags        preset v5e (9 flags; --xla_preset=none turns it off)\n"
    assert run_command("plan", *flags, XLA_FLAGS="", fresh=True).stdout.endswith(said)
    for preset, name in (((), "v5e"), (("--xla_preset=none",), "none")):
        process = run_command("plan", *flags, *preset, "--json", XLA_FLAGS="", fresh=True)
        assert json.loads(process.stdout)["xla_preset"] == name


@pytest.mark.tpu
def test_the_tpu_compiler_aborts_on_a_flag_that_it_does_not_know():
    assert compile_for_tpu("", "v5p:2x2x2").returncode != 0
