"""The commands as users run them: exit status, messages, and the files that they leave."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys

import pytest

from tests.helpers import (
    ROOT,
    TINY_FLAGS,
    flip_bit,
    one_line_error,
    outputs_of,
    read_until,
    records,
    run_command,
    run_module,
    start_train,
    without_gloo,
)


def train(corpus, workdir, *flags, **kwargs):
    source = f"--config.data.source={corpus}"
    return run_command("train", *TINY_FLAGS, source, f"--workdir={workdir}", *flags, **kwargs)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("commands") / "run"
    flags = ("--config.train.steps=8", "--config.train.sample_prompt=def __init__(self")
    process = train(corpus, workdir, *flags)
    assert process.returncode == 0, process.stderr
    return workdir, process


def test_a_run_is_quiet_and_says_where_things_are(run):
    workdir, process = run
    assert process.stderr == ""
    lines = process.stdout.splitlines()
    assert lines[0].startswith("training a tokenizer of 300 ids")
    assert sum(line.startswith("step ") and "tokens/s" in line for line in lines) == 4
    for name in ("checkpoints", "plots/loss.png", "tensorboard"):
        assert any(str(workdir / name) in line for line in lines)
        assert (workdir / name).exists()
    assert "what it writes after 'def __init__(self'" in process.stdout


def test_again_it_is_finished(run, corpus):
    workdir, _ = run
    process = train(corpus, workdir, "--config.train.steps=8")
    assert process.returncode == 0
    assert "finished already" in process.stdout


def test_generate(run):
    workdir, _ = run
    flags = (f"--checkpoint={workdir}", "--prompt=abc", "--prompt=de f", "--max_tokens=5")
    first, second = run_command("generate", *flags), run_command("generate", *flags)
    assert first.returncode == 0
    assert re.fullmatch(r"\d+ new tokens; .* tokens/s\n", first.stderr)
    assert first.stdout == second.stdout
    blocks = re.split(r"--- \d ---\n", first.stdout)
    assert blocks[1].startswith("abc") and blocks[2].startswith("de f")
    step = run_command("generate", f"--checkpoint={workdir}/checkpoints/4", "--prompt=abc")
    assert step.returncode == 0 and step.stdout.startswith("abc")


def test_generate_for_a_file_of_prompts_on_a_mesh(run, tmp_path):
    workdir, _ = run
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\nde f\nq 日\n")
    flags = (f"--checkpoint={workdir}", f"--prompts={prompts}", "--json", "--temperature=0")
    alone = run_command("generate", *flags, "--max_tokens=7", "--batch_size=2")
    assert alone.returncode == 0, alone.stderr
    rows = [json.loads(line) for line in alone.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["abc", "de f", "q 日"]
    assert all(row["tokens"] <= 7 and isinstance(row["text"], str) for row in rows)
    mesh = ("--max_tokens=7", "--mesh=data=2,tensor=2")
    assert run_command("generate", *flags, *mesh, devices=4).stdout == alone.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--checkpoint is missing"),
        (("--checkpoint=/nothing/here",), "no checkpoint in /nothing/here"),
        (("--checkpoint={run}", "--prompt=" + "abc " * 40), "the model's context is 32"),
        (("--checkpoint={run}", "--temperature=-1"), "temperature must be 0"),
        (("--checkpoint={run}", "--top_p=2"), "top_p must be in"),
        (("--checkpoint={run}", "--prompts=/nothing"), "cannot read --prompts=/nothing"),
        (("--checkpoint={run}", "--batch_size=0"), "--batch_size must be at least 1"),
        (("--checkpoint={run}", "--mesh=tensor=3"), "does not cover 1 devices"),
        (("--checkpoint={run}", "--promt=x"), "Did you mean: prompt"),
    ],
)
def test_generate_with_bad_input(run, flags, message):
    flags = [flag.format(run=run[0]) for flag in flags]
    assert message in one_line_error(run_command("generate", *flags))


def test_weights_go_out_and_come_back(run, tmp_path):
    """A trained model is exported to Hugging Face and imported again; it writes the same text."""
    workdir, _ = run
    places = (f"--source=ckpt:{workdir}", f"--target=hf:{tmp_path}/hf")
    out = run_command("convert", *places)
    assert out.returncode == 0 and out.stderr == ""
    assert f"wrote {tmp_path}/hf:" in out.stdout and "float32" in out.stdout
    assert "| training loss |" in (tmp_path / "hf" / "README.md").read_text()
    back = run_command("convert", f"--source=hf:{tmp_path}/hf", f"--target=ckpt:{tmp_path}/run")
    assert back.returncode == 0 and back.stderr == ""
    flags = ("--prompt=abc", "--max_tokens=5", "--temperature=0")
    samples = [
        run_command("generate", f"--checkpoint={place}", *flags).stdout
        for place in (workdir, tmp_path / "run")
    ]
    assert samples[0] == samples[1] and samples[0].startswith("abc")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--source must be FORMAT:DIR"),
        (("--source=hf:x",), "--target must be FORMAT:DIR"),
        (("--source=hf:/nothing/here", "--target=ckpt:x"), "/nothing/here does not exist"),
        (("--source=hf:x", "--target=ckpt:y", "--dtype=float32"), "a checkpoint holds float32"),
        (("--source=hf:x", "--target=meta:y", "--context=5"), "--context is for meta"),
        (("--source=hf:x", "--target=hf:y", "--dtype=int8"), "int8"),
        (("--source=hf:configs", "--target=ckpt:y"), "configs is not a Hugging Face model"),
        (("--source=ckpt:configs", "--target=hf:y"), "no checkpoint in configs"),
        (("--source=ckpt:{run}", "--target=hf:configs"), "configs exists; choose another"),
    ],
)
def test_convert_with_bad_input(run, flags, message):
    flags = [flag.format(run=run[0]) for flag in flags]
    assert message in one_line_error(run_command("convert", *flags))
    assert not (ROOT / "y").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--workdir=x",), "--config is missing; try --config=configs/tiny.py"),
        (("--config=configs/tiny.py",), "--workdir is missing"),
        (("--config=configs/nothing.py", "--workdir=x"), "configs/nothing.py"),
        (
            ("--config=configs/tiny.py", "--workdir=x", "--config.optim.peek_lr=1"),
            "error: optim has no field peek_lr; did you mean peak_lr?",
        ),
        (("--config=configs/tiny.py", "--workdri=x"), "Did you mean: workdir"),
        (("--config=configs/tiny.py", "--workdir=x", "--config.train.steps=many"), "many"),
        (
            ("--config=configs/tiny.py", "--workdir=x", "--config.train.steps=-5"),
            "steps must be positive",
        ),
        (("--config=configs/tiny.py", "--workdir=x", "extra"), "unexpected argument 'extra'"),
        (
            ("--config=configs/tiny.py", "--workdir=x", "--config.mesh.tensor=3"),
            "does not cover 1 devices",
        ),
        (
            ("--config=configs/tiny.py", "--workdir=x", "--config.train.grad_accum=3"),
            "global_batch=8 is not a multiple of train.grad_accum=3",
        ),
        (
            ("--config=configs/65b.py", "--workdir=x"),
            "this model has 65,285,660,672 parameters",
        ),
        (
            ("--config=configs/tiny.py", "--workdir={tmp}/r", "--config.data.source=/no/such.txt"),
            "data.source: /no/such.txt does not exist",
        ),
        (
            ("--config=configs/tiny.py", "--workdir=/proc/no", "--config.train.steps=100"),
            "/proc/no",
        ),
    ],
)
def test_train_with_bad_input(flags, message, tmp_path):
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    assert message in one_line_error(run_command("train", *flags))
    assert not (ROOT / "x").exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.mesh.tensor=8", "does not divide over tensor = 8"),
        ("--config.train.global_batch=4", "do not divide over data x fsdp = 8"),
    ],
)
def test_a_mesh_that_does_not_divide(corpus, tmp_path, flag, message):
    process = train(corpus, tmp_path / "run", flag, devices=8)
    assert message in one_line_error(process)
    assert not (tmp_path / "run").exists()


def test_another_config_in_the_work_directory(run, corpus):
    workdir, _ = run
    process = train(corpus, workdir, "--config.train.steps=8", "--config.optim.peak_lr=0.5")
    message = one_line_error(process)
    assert "holds a run of another config" in message and "optim.peak_lr is 0.002" in message


def test_a_damaged_shard(run, corpus, tmp_path):
    workdir = shutil.copytree(run[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    path = workdir / "data" / "train-00000-000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    message = one_line_error(train(corpus, workdir, "--config.train.steps=8"))
    assert "train-00000-000.bin has" in message and "the manifest says" in message


def test_another_tokenizer(run, corpus, tmp_path):
    workdir = shutil.copytree(run[0], tmp_path / "run")
    (workdir / "data" / "tokenizer.model").write_bytes(b"other")
    message = one_line_error(train(corpus, workdir, "--config.train.steps=8"))
    assert "is not the tokenizer that made these shards" in message


def test_sigterm_saves_and_the_same_command_goes_on(corpus, tmp_path):
    flags = ["--config.train.steps=100000", "--config.train.checkpoint_every=100000"]
    flags += ["--config.train.eval_every=100000", "--stopped_status=75"]
    (process,) = start_train(corpus, tmp_path / "run", *flags, devices=1)
    read_until(process, "step ")
    process.send_signal(signal.SIGTERM)
    ((rest, errors),) = outputs_of([process])
    assert process.returncode == 75, errors
    stopped = int(re.search(r"stopped at step (\d+), saved", rest)[1])
    assert (tmp_path / "run" / "checkpoints" / str(stopped)).exists()
    assert (tmp_path / "run" / "plots" / "loss.png").exists()


def losses_of(workdir):
    numbers = (line for line in records(workdir) if "event" not in line)
    return {line["step"]: line.get("loss", line.get("eval_loss")) for line in numbers}


def test_two_processes_train_as_one(corpus, tmp_path):
    flags = ("--config.train.steps=8", "--config.train.checkpoint_every=100")
    flags += ("--config.train.sample_prompt=",)
    pair = start_train(corpus, tmp_path / "two", *flags, processes=2, devices=2)
    outputs = outputs_of(pair)
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert "start   2 processes, found by environment\n" in outputs[0][0]
    assert "on 4 cpu device(s), 2 process(es)" in outputs[0][0]
    # Only process 0 prints, apart from the library that carries the messages between CPUs.
    assert without_gloo(outputs[1][0]) == []
    one = train(corpus, tmp_path / "one", *flags, devices=4)
    assert one.returncode == 0, one.stderr
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=2e-6)
    # After two processes stopped, one process goes on or sees that nothing is left to do.
    again = train(corpus, tmp_path / "two", *flags, devices=4)
    assert "finished already" in again.stdout, again.stderr


def test_sigterm_to_one_process_stops_both_at_the_same_step(corpus, tmp_path):
    flags = ("--config.train.steps=100000", "--config.train.eval_every=100000")
    flags += ("--config.train.checkpoint_every=100000",)
    pair = start_train(corpus, tmp_path / "run", *flags, processes=2, devices=1)
    read_until(pair[0], "step ")
    pair[1].send_signal(signal.SIGTERM)
    outputs = outputs_of(pair)
    assert [process.returncode for process in pair] == [0, 0], outputs
    stopped = re.search(r"stopped at step (\d+), saved", outputs[0][0])[1]
    assert (tmp_path / "run" / "checkpoints" / stopped).exists()


def test_half_an_environment_for_many_processes_is_an_error(corpus, tmp_path):
    process = train(corpus, tmp_path / "run", JAX_COORDINATOR_ADDRESS="localhost:1")
    assert "JAX_NUM_PROCESSES is ''" in one_line_error(process)


def test_an_unknown_preset_of_compiler_flags(corpus, tmp_path):
    message = one_line_error(train(corpus, tmp_path / "run", "--xla_preset=v6"))
    assert "no XLA preset 'v6' among none, v4" in message
    assert not (tmp_path / "run").exists()


def test_nothing_is_writable_for_all_whatever_the_umask(corpus, tmp_path):
    flags = ("--config.train.steps=3", "--config.model.n_layers=1", "--config.data.workers=2")
    before = os.umask(0)
    try:
        cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
        cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        trained = train(corpus, tmp_path / "run", *flags, **cache)
        source = f"--config.data.source={corpus}"
        prepared = run_command("prepare", *TINY_FLAGS, source, f"--output={tmp_path / 'shards'}")
    finally:
        os.umask(before)
    assert (trained.returncode, prepared.returncode) == (0, 0), trained.stderr + prepared.stderr
    for name, suffix in (("run", "loss.png"), ("cache", "-cache"), ("shards", ".bin")):
        paths = [tmp_path / name, *(tmp_path / name).rglob("*")]
        assert any(path.name.endswith(suffix) for path in paths), paths
        modes = {str(path): path.stat().st_mode for path in paths}
        assert not [path for path, mode in modes.items() if mode & stat.S_IWOTH]
        # The other bits of the mask stay as the user set them.
        assert all(mode & stat.S_IROTH for mode in modes.values())


def test_prepare_and_verify(corpus, tmp_path):
    config = (*TINY_FLAGS, f"--config.data.source={corpus}")
    process = run_command("prepare", *config, f"--output={tmp_path / 'shards'}")
    assert process.returncode == 0 and process.stderr == ""
    assert f"token shards in {tmp_path / 'shards'}" in process.stdout
    verify = f"--verify={tmp_path / 'shards'}"
    assert "every file is as the manifest says" in run_command("prepare", verify).stdout
    path = tmp_path / "shards" / "train-00000-000.bin"
    data = bytearray(path.read_bytes())
    data[7] ^= 255
    path.write_bytes(data)
    assert "damaged or missing" in one_line_error(run_command("prepare", verify))
    # All sources of a folder are verified.
    shutil.copytree(tmp_path / "shards", tmp_path / "both" / "bad")
    path.write_bytes(bytes([*data[:7], data[7] ^ 255, *data[8:]]))
    shutil.copytree(tmp_path / "shards", tmp_path / "both" / "good")
    process = run_command("prepare", f"--verify={tmp_path / 'both'}")
    assert f"{tmp_path}/both/bad/train-00000-000.bin" in one_line_error(process)
    good = f"{re.escape(str(tmp_path))}/both/good: every file is as the manifest says"
    assert re.fullmatch(rf"{good} \(0.\d\d\d GB at \d+.\d\d GB/s\)\n", process.stdout)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--config=configs/tiny.py",), "--output is missing"),
        (("--verify=/nothing",), "no token shards in /nothing"),
    ],
)
def test_prepare_with_bad_input(flags, message):
    assert message in one_line_error(run_command("prepare", *flags))


def test_a_tokenizer_file_that_is_none(corpus, tmp_path):
    bad = tmp_path / "bad.model"
    bad.write_text("nothing")
    process = train(corpus, tmp_path / "run", f"--config.data.tokenizer={bad}")
    assert "bad.model is not a SentencePiece model" in one_line_error(process)


@pytest.mark.parametrize("how", ["full", pytest.param("fills up", marks=pytest.mark.slow)])
def test_a_full_disk_during_the_last_saves(corpus, tmp_path, how):
    """Training goes on after the first failed save; a failure of the last save is an error."""
    flags = (*TINY_FLAGS, f"--config.data.source={corpus}", f"--workdir={tmp_path / 'run'}")
    process = run_module("tests.faults.full_disk", how, *flags, "--config.train.steps=12")
    if how == "full":
        message = one_line_error(process)
        assert "the step takes 0.00 GB, the disk has 0.00 GB free" in message
    else:
        # Threads of tensorstore print that orbax gave up, whatever the log level, and may do so in
        # the middle of our line.
        assert process.returncode == 1
        message = process.stderr
        assert "error: saving to" in message and "File too large" in message
    assert "saving to" in message and "earlier checkpoints are untouched" in message
    # A thread prints the warning, possibly in the middle of another line.
    assert re.findall(r"warning: saving step (\d+) ", process.stdout) == ["8", "12"]
    assert "step 12/12" in process.stdout
    again = train(corpus, tmp_path / "run", "--config.train.steps=12")
    assert again.returncode == 0, again.stderr
    assert "resume  from step 4" in again.stdout and "finished at step 12" in again.stdout


def test_verify_checkpoints_and_go_on_after_damage(run, corpus, tmp_path):
    workdir = shutil.copytree(run[0], tmp_path / "run")
    process = run_command("checkpoint", f"--verify={workdir}")
    assert process.returncode == 0 and process.stderr == ""
    good = "good, every file is as it was written"
    assert process.stdout.splitlines() == [f"{workdir}/checkpoints/{n}: {good}" for n in (4, 8)]
    newest = workdir / "checkpoints" / "8"
    path = max((newest / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    flip_bit(path, 4 * path.stat().st_size)
    for place in (workdir, newest):
        process = run_command("checkpoint", f"--verify={place}")
        assert process.returncode == 1 and process.stderr == ""
        name = path.relative_to(newest)
        damaged = f"{newest}: damaged: {name} holds other bytes than were written"
        assert process.stdout.splitlines()[-1] == damaged
    # A step that is given by name is not replaced by another one. Its files are not hashed, but the
    # fingerprint shows the damage.
    process = run_command("generate", f"--checkpoint={newest}", "--prompt=abc")
    assert "8 differs from what was saved: params/" in one_line_error(process)
    process = train(corpus, workdir, "--config.train.steps=8")
    assert process.returncode == 74, process.stderr
    assert process.stdout.splitlines()[-1].startswith("exit status 74: trained to the end, but a ")
    assert f"damaged checkpoint 8: {name}" in process.stdout
    assert "resume  from step 4" in process.stdout and "finished at step 8" in process.stdout
    assert losses_of(workdir) == losses_of(run[0])
    process = run_command("generate", f"--checkpoint={workdir}", "--prompt=abc")
    assert process.returncode == 0


def test_a_step_with_a_file_missing_is_passed_over(run, tmp_path):
    workdir = shutil.copytree(run[0], tmp_path / "run")
    (workdir / "checkpoints" / "8" / "tokenizer" / "metadata").unlink()
    process = run_command("generate", f"--checkpoint={workdir}", "--prompt=abc")
    assert process.returncode == 0 and process.stdout.startswith("abc")
    assert "8 is damaged: tokenizer/metadata is missing" in process.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [((), "--verify is missing"), (("--verify=/nothing",), "no checkpoint in /nothing")],
)
def test_verify_with_bad_input(flags, message):
    assert message in one_line_error(run_command("checkpoint", *flags))


@pytest.mark.parametrize(
    "module", ["train", "prepare", "generate", "evaluate", "data", "convert", "checkpoint"]
)
def test_help_is_complete_and_has_an_example(module):
    """A new interpreter imports only what the command needs."""
    process = run_command(module, "--help", fresh=True)
    assert process.returncode == 0 and process.stderr == ""
    assert f"python -m llama_jax.{module}" in process.stdout
    assert "Example:" in process.stdout
    expected = {
        "train": (
            *("--config", "--workdir", "--xla_preset", "--start_timeout"),
            "--stopped_status",
            "--damaged_status",
        ),
        "prepare": ("--config", "--output", "--verify"),
        "generate": (
            *("--checkpoint", "--prompt", "--max_tokens", "--temperature", "--top_k", "--top_p"),
            *("--seed", "--prompts", "--mesh", "--batch_size"),
        ),
        "evaluate": (
            *("--checkpoint", "--text", "--text_field", "--shards", "--split", "--tasks"),
            *("--num_fewshot", "--stride", "--batch_size", "--limit", "--mesh"),
        ),
        "convert": ("--source", "--target", "--dtype", "--context", "--average"),
        "checkpoint": ("--verify",),
        "data": ("--show", "--config", "--step", "--rows", "--lines", "--plot"),
    }[module]
    for flag in expected:
        assert f"  {flag}:" in process.stdout, flag
    # Only our flags are listed, not those of every library.
    assert "--logtostderr" not in process.stdout


def test_the_benchmark_prints_one_line_of_json():
    flags = ("--config=configs/tiny.py", "--config.model.dim=32", "--config.model.n_heads=4")
    process = subprocess.run(
        [sys.executable, "benchmarks/train_step.py", *flags, "--steps=3", "--warmup=1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    record = json.loads(process.stdout)
    assert len(process.stdout.splitlines()) == 1
    expected = record["tokens_per_step"] / record["step_seconds_median"]
    assert record["tokens_per_second"] == pytest.approx(expected, rel=0.01)
    assert record["mfu"] is None and record["peak_memory_bytes"] > 10**7
    assert record["step_seconds_p10"] <= record["step_seconds_median"]


@pytest.mark.parametrize("command", ["generate", "train", "prepare", "evaluate", ""])
def test_what_needs_no_tensorflow(command):
    module = f"llama_jax.{command}" if command else "train_step"
    code = (
        f"import sys; sys.argv = ['x']; sys.path.insert(0, 'benchmarks'); import {module};"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=600)
