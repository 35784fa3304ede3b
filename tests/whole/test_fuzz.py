"""Foreign files with an error in them: every command succeeds or fails with one line.

Each test gives changed files of one format to the functions that read it in the commands, and lists
every change that ended in another way.
"""

import itertools
import json
import shutil

import pytest
from etils import epath

from llama_jax import files
from llama_jax.checkpoint import saved_step
from llama_jax.checkpoint.fingerprint import fingerprint
from llama_jax.checkpoint.retention import dispensable_steps
from llama_jax.data.prepare.job import prepare
from llama_jax.data.prepare.report import report_of
from llama_jax.data.shards import layout
from llama_jax.data.shards.reader import TokenDataset
from llama_jax.data.show import summary
from llama_jax.data.show.rows import Screen
from llama_jax.errors import UserError
from llama_jax.files import encode_entries, entry_of, read_entries
from llama_jax.inference.chat import open_template
from llama_jax.inference.loaded_model import InferenceModel, open_model
from llama_jax.inference.prompts import read_messages, read_prompts
from llama_jax.interchange import formats, peft
from llama_jax.interchange.ckpt import describe
from llama_jax.interchange.hf import HfSource, HfTarget
from llama_jax.interchange.opening import open_init, open_source
from llama_jax.interchange.transfer import convert
from llama_jax.text.saved_tokenizer import MANIFEST
from llama_jax.text.templates import open_choice
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.text.tokenizer_files import is_tokenizer_file
from llama_jax.train import resume
from llama_jax.train.instruments.metrics import plot_loss
from tests.helpers import (
    TINY,
    llama3_tokenizer,
    random_adapters,
    random_params,
    replace,
    save_checkpoint,
    text_config,
)
from tests.reference import mutations
from tests.reference.chat_templates import LLAMA3, WITH_SYSTEM

COUNT = 300
WHOLE = 40  # one in this many accepted changes goes through all of `convert`
CONFIG = replace(TINY, model__vocab_size=404, train__seq_len=64)
# Sizes for which no machine has the memory. Python's own JSON has no limit of size.
HUGE = (10**9, 10**12, 2**31 - 1, 2**63, -(10**9), 10**400)


def of_anything(content):
    """Yields contents that any file may be replaced with."""
    yield from (b"", b"\n", b"\0" * 10, b"\xff\xfe\xfd", b"[" * 100_000, b'{"a":' * 100_000)
    yield from (b"[]", b"{}", b"null", b"3", b'"x"', b"NaN", b"1e999", b"[{}]", b"9" * 5000)
    yield content[: len(content) // 2]
    yield content + content
    yield content.decode().encode("utf-16")
    yield content.decode().encode("utf-8-sig")
    yield content.replace(b'"', b"'")
    yield content + b"\xff"


def of_sizes(values):
    """Yields copies of a JSON value, in each of which one number is huge."""
    places = list(_numbers(values))
    for place, size in itertools.product(places[:40], HUGE):
        changed = json.loads(json.dumps(values))
        *way, last = place
        inner = changed
        for key in way:
            inner = inner[key]
        inner[last] = size
        yield changed


def _numbers(values, place=()):
    pairs = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in pairs:
        if isinstance(value, dict | list):
            yield from _numbers(value, (*place, key))
        elif type(value) in (int, float):
            yield (*place, key)


def of_json_file(content, count=COUNT):
    """Yields changed JSON files: other bytes, values, keys, sizes or encoding."""
    yield from of_anything(content)
    yield from mutations.of_bytes(content, count // 3)
    values = json.loads(content)
    yield from (dumped(one) for one in of_sizes(values))
    yield from (dumped(one) for one in mutations.of_json(values, 2 * count // 3))
    # A value nested deeply, a number with more digits than Python reads, an infinite number, or a
    # key that occurs twice.
    for key in list(values)[:20] if isinstance(values, dict) else ():
        text = json.dumps({**values, key: "PLACE"})
        for given in ("[" * 50_000 + "]" * 50_000, "9" * 5000, "1e999", f'1, "{key}": 2'):
            yield text.replace('"PLACE"', given).encode()


def dumped(values):
    return json.dumps(values).encode(errors="surrogatepass")


def failures(path, changes, act):
    """Writes each change to `path` and calls `act`; returns those with another end, by place.

    An accepted end is success or an error of one line. The last two changes are no file and a
    folder in its place; after them, the file is restored.
    """
    good, found = path.read_bytes(), {}

    def attempt(what):
        try:
            act()
        except UserError as error:
            if "\n" in str(error):
                note(f"{_where(error)}: more than one line", what, error)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # panics of Rust, too
            note(f"{_where(error)}: {type(error).__name__}", what, error)

    def note(kind, what, error):
        found.setdefault(kind, []).append((what, str(error)[:150]))

    for changed in changes:
        if changed != good:
            path.write_bytes(changed)
            attempt(changed)
    path.unlink()
    attempt(b"(nothing)")
    path.mkdir()
    attempt(b"(a folder)")
    path.rmdir()
    path.write_bytes(good)
    act()  # the restored file must be accepted
    return found


def _where(error):
    """Returns the last line of the package in the traceback."""
    where = ""
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "llama_jax/" in name:
            where = f"{name.rpartition('llama_jax/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return where


def none(found):
    """Fails if there are failures, and shows each kind with its smallest input."""
    lines = []
    for what, inputs in found.items():
        smallest, said = min(inputs, key=lambda one: len(one[0]))
        shown = smallest if len(smallest) < 400 else smallest[:100] + b"..." + smallest[-100:]
        lines.append(f"{what}: {said} ({len(inputs)} times, such as {shown!r})")
    if lines:
        pytest.fail(f"{len(lines)} kinds:\n" + "\n".join(lines[:40]), pytrace=False)


# Hugging Face's files.


@pytest.fixture(scope="module")
def made(tmp_path_factory, corpus):
    """Writes a Hugging Face folder with several shards and all kinds of files that belong to it."""
    folder = tmp_path_factory.mktemp("fuzz") / "hf"
    folder.mkdir()
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    added = {"content": eos, "lstrip": False, "normalized": False, "special": True}
    special = {"bos_token": bos, "eos_token": added}
    values = {**special, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64}
    values |= {"chat_template": [{"name": "default", "template": LLAMA3}], "add_bos_token": True}
    tokenizer = llama3_tokenizer(corpus)
    ids = {one["content"]: one["id"] for one in json.loads(tokenizer)["added_tokens"]}
    values["added_tokens_decoder"] = {str(ids[eos]): added}
    files = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": json.dumps(values).encode(),
        "special_tokens_map.json": json.dumps(special).encode(),
        "generation_config.json": json.dumps(
            {"bos_token_id": ids[bos], "eos_token_id": [ids[eos]], "temperature": 0.6}
        ).encode(),
        "chat_template.jinja": LLAMA3.encode(),
        "additional_chat_templates/short.jinja": b"{{ messages[0].content }}",
    }
    description = formats.Description(CONFIG, "float32", files)
    target = HfTarget(epath.Path(folder), description, "float32", shard_size=60_000)
    params = random_params(CONFIG.model)
    for path, layer in formats.paths_and_layers(CONFIG.model):
        node = params
        for key in path.split("/"):
            node = node[key]
        target.write(path, layer, node if layer is None else node[layer])
    target.close()
    return folder


@pytest.fixture
def hf(made, tmp_path):
    return shutil.copytree(made, tmp_path / "hf")


class There:
    """Opens a Hugging Face folder as `convert` and a run do; every `WHOLE`-th call converts it."""

    def __init__(self, folder, scratch):
        self.folder, self.scratch, self.count = folder, scratch, 0

    def __call__(self):
        HfSource(self.folder)
        self.count += 1
        if self.count % WHOLE:
            return
        try:
            source = open_source("hf", epath.Path(self.folder))
            convert(source, "ckpt", self.scratch / "run")
            convert(open_source("ckpt", epath.Path(self.scratch / "run")), "hf", self.scratch / "x")
            open_template(open_model(self.scratch / "run", "tensor=1")).encode(WITH_SYSTEM)
        finally:
            left = {path.name for path in self.scratch.iterdir()}
            assert left <= {"run", "x", "hf"}, left
            for name in ("run", "x"):
                shutil.rmtree(self.scratch / name, ignore_errors=True)


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "model.safetensors.index.json", "generation_config.json"),
        *("tokenizer_config.json", "special_tokens_map.json"),
    ],
)
def test_files_of_hugging_face(hf, tmp_path, name):
    path = hf / name
    # No value of special_tokens_map.json is used, so fewer changes are enough.
    every = 5 if name == "special_tokens_map.json" else 1
    changes = itertools.islice(of_json_file(path.read_bytes()), 0, None, every)
    none(failures(path, changes, There(hf, tmp_path)))


def of_tokenizer_json(content):
    """Yields the changes of `of_json_file`, and changes outside of the large vocabulary."""
    yield from of_json_file(content, COUNT // 3)
    values = json.loads(content)
    vocabulary = values["model"].pop("vocab"), values["model"].pop("merges")
    for changed in mutations.of_json(values, COUNT // 2):
        if isinstance(changed, dict) and isinstance(changed.get("model"), dict):
            changed["model"] |= {"vocab": vocabulary[0], "merges": vocabulary[1]}
        yield dumped(changed)


def test_tokenizer_json(hf, tmp_path):
    path, there = hf / "tokenizer.json", There(hf, tmp_path)

    def act():
        tokenizer = Tokenizer.load(path)
        tokenizer.decode(tokenizer.encode("A line, <|eot_id|>\n"))
        tokenizer.texts(tokenizer.encode("<|eot_id|> é\n", special=True))
        tokenizer.encode(tokenizer.protected("<|eot_id|> é\n"), special=True)
        there()

    none(failures(path, of_tokenizer_json(path.read_bytes()), act))


def test_tokenizer_config_beside_a_tokenizer(hf):
    path = hf / "tokenizer_config.json"
    changes = of_json_file(path.read_bytes())
    none(failures(path, changes, lambda: Tokenizer.load(hf / "tokenizer.json")))


@pytest.mark.parametrize(
    "name",
    [
        *("chat_template.jinja", "additional_chat_templates/short.jinja"),
        *("tokenizer_config.json", "tokenizer.json", "generation_config.json"),
    ],
)
def test_chats_of_a_checkpoint_with_such_files(hf, tmp_path, name):
    tokenizer = Tokenizer.load(hf / "tokenizer.json")
    others = {
        file.relative_to(hf).as_posix(): file.read_bytes()
        for file in hf.rglob("*")
        if is_tokenizer_file(file.relative_to(hf).as_posix())
    }
    if name == "tokenizer_config.json":
        del others["chat_template.jinja"]  # the file that would be preferred
    path = hf / name

    def act():
        if not path.is_file():
            return
        files = {**others, name: path.read_bytes()}
        model = InferenceModel(tmp_path / "run", CONFIG, None, tokenizer, None, 64, files)
        assert all(0 <= token < CONFIG.model.vocab_size for token in model.eos_ids)
        open_template(model, "short" if "short" in name else "default").encode(WITH_SYSTEM)

    content = path.read_bytes()
    changes = of_json_file(content, 150) if name.endswith("json") else of_text(content)
    none(failures(path, changes, act))


def of_text(content):
    yield from of_anything(content)
    yield from mutations.of_bytes(content, COUNT)


@pytest.mark.parametrize("name", ["template.jinja", "template.json"])
def test_a_template_for_training(hf, tmp_path, name):
    tokenizer = Tokenizer.load(hf / "tokenizer.json")
    path = tmp_path / name
    in_json = json.dumps({"chat_template": LLAMA3, "bos_token": "<|begin_of_text|>"})
    path.write_text(in_json if name.endswith("json") else LLAMA3)
    content = path.read_bytes()
    changes = of_json_file(content) if name.endswith("json") else of_text(content)

    def act():
        open_choice(str(path), tokenizer, {}).encode(WITH_SYSTEM)

    none(failures(path, changes, act))


# PEFT's and Meta's files.


def test_adapter_config(made, tmp_path):
    lora = replace(CONFIG, init_from=f"hf:{made}", lora__rank=2, lora__targets="wq,w2")
    folder = epath.Path(tmp_path / "adapters")
    folder.mkdir()
    peft.write(folder, lora, random_adapters(lora))
    path = tmp_path / "adapters" / "adapter_config.json"
    count = itertools.count()

    def act():
        found, _ = peft.read_config(folder)
        if next(count) % WHOLE == 0:
            open_source("peft", folder)
        else:
            peft.read(folder, CONFIG.model, found)

    none(failures(path, of_json_file(path.read_bytes()), act))


@pytest.mark.parity
def test_params_json(made, tmp_path):
    convert(HfSource(made), "meta", tmp_path / "meta")
    path = tmp_path / "meta" / "params.json"

    def act():
        open_source("meta", epath.Path(tmp_path / "meta"))

    none(failures(path, of_json_file(path.read_bytes()), act))


# Our own files, which may be foreign, too.


@pytest.fixture(scope="module")
def packed(corpus, tmp_path_factory):
    """Writes shards of packed documents."""
    folder = tmp_path_factory.mktemp("fuzz") / "shards"
    config = text_config(corpus, data__packing="best_fit", train__seq_len=32)
    prepare(config, folder, log=lambda line: None)
    return folder


@pytest.mark.parametrize("sealed", [False, True])
def test_the_manifest_of_shards(packed, tmp_path, sealed, monkeypatch):
    # Documents beyond the window are read in the same way.
    monkeypatch.setattr(summary, "WINDOW", 3 * summary.CHUNK)
    folder = shutil.copytree(packed, tmp_path / "shards")
    path = folder / "manifest.json"

    def act():
        layout.verify(folder)
        str(report_of(epath.Path(folder), layout.read_manifest(folder)))
        prepared = summary.open_prepared(folder)
        summary.summary(prepared, 0, Screen(width=80, lines=0))
        for split in layout.SPLITS:
            data = TokenDataset.open(folder, split)
            data.tokens(0, 10)
            for sequence in {0, data.n_sequences // 2, data.n_sequences - 1}:
                if data.n_sequences:
                    data.pieces(sequence)
            next(data.documents(), None)
            data.template()

    none(failures(path, _sealed(path.read_bytes(), layout.encode_manifest, sealed), act))


def _sealed(content, encode, sealed):
    """Yields changes of a manifest; with `sealed`, changed values with a checksum that fits."""
    if not sealed:
        yield from of_json_file(content)
        return
    values = json.loads(content)
    values.pop("sha256", None)
    for changed in itertools.chain(of_sizes(values), mutations.of_json(values, COUNT)):
        if isinstance(changed, dict):
            yield encode(changed)


@pytest.fixture(scope="module")
def saved(made, corpus, tmp_path_factory):
    """Writes a work directory with one step, and the files that a run writes next to it."""
    tokenizer = Tokenizer.load(made / "tokenizer.json")
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    save_checkpoint(folder, CONFIG, random_params(CONFIG.model), tokenizer.model_bytes)
    (folder / "config.json").write_text(CONFIG.to_json())
    return folder


@pytest.fixture
def run(saved, tmp_path, monkeypatch):
    # To start 16 threads thousands of times would cost the most.
    monkeypatch.setattr(files, "_THREADS", 1)
    return shutil.copytree(saved, tmp_path / "run")


def sealer(step):
    """Returns a function that updates the manifest of a step after a change of a file."""
    entries = read_entries(epath.Path(step) / MANIFEST)

    def seal(path):
        if path.is_file():
            entries[path.relative_to(step).as_posix()] = entry_of(path.read_bytes())
            (step / MANIFEST).write_text(encode_entries(entries))

    return seal


def described(run):
    """Does what every reader of a step does before it reads arrays; `run` may also be the step."""
    step = saved_step.find_step(run)
    meta = saved_step.load_meta(step)
    describe(step, meta)
    dispensable_steps(step.parent, replace(CONFIG, train__keep_best=1).train)
    return step, meta


@pytest.mark.parametrize("item", ["meta", "tokenizer"])
@pytest.mark.parametrize("sealed", [False, True])
def test_what_a_step_says_about_itself(run, tmp_path, item, sealed, capfd):
    step = run / "checkpoints" / "0"
    path = step / item / "metadata"
    content, count = path.read_bytes(), itertools.count(1)
    seal = sealer(step)
    values = json.loads(content)
    config = "config" in values and json.loads(values["config"])

    def changes():
        yield from of_json_file(content)
        if config and sealed:  # JSON within JSON
            for changed in itertools.chain(of_sizes(config), mutations.of_json(config, COUNT)):
                yield dumped({**values, "config": json.dumps(changed)})

    def act():
        number = next(count)
        if sealed:
            seal(path)
        # For a work directory the whole step is hashed; for a step given by name, only the files
        # that are read.
        found, _ = described(step if sealed and number % WHOLE else run)
        if number % (4 * WHOLE) == 0:
            convert(open_source("ckpt", found), "hf", tmp_path / "x")
            shutil.rmtree(tmp_path / "x")

    # A file that does not fit the manifest is not even parsed, so fewer changes are enough.
    none(failures(path, itertools.islice(changes(), 0, None, 1 if sealed else 10), act))


@pytest.mark.parametrize("sealed", [False, True])
def test_the_manifest_of_a_step(run, sealed, capfd):
    path = run / "checkpoints" / "0" / "manifest.json"

    def encode(changed):
        return encode_entries(changed.get("files")).encode()

    none(failures(path, _sealed(path.read_bytes(), encode, sealed), lambda: described(run)))


@pytest.mark.parametrize("sealed", [False, True])
def test_the_list_of_arrays_of_a_step(run, sealed, capfd):
    """Orbax reads the list: either the numbers are those that were saved, or none are read."""
    step = run / "checkpoints" / "0"
    path = step / "params" / "_METADATA"
    good = fingerprint(open_model(step, "tensor=1").params)
    seal = sealer(step)

    def act():
        if sealed:
            seal(path)
        open_source("ckpt", epath.Path(step))
        assert fingerprint(open_model(step, "tensor=1").params) == good

    changes = list(of_json_file(path.read_bytes(), 30))
    none(failures(path, changes[:: 1 + len(changes) // 30], act))


def test_the_config_of_a_work_directory(run, tmp_path):
    path = run / "config.json"
    none(
        failures(
            path,
            of_json_file(path.read_bytes()),
            lambda: resume.check_workdir(CONFIG, epath.Path(run)),
        )
    )


def test_what_a_run_wrote_of_itself(run, tmp_path):
    """`convert` reads it for the model card, and a run that goes on reads it, too."""
    step = run / "checkpoints" / "0"
    meta = saved_step.load_meta(step)
    late = type(meta)(**{**vars(meta), "step": 5})
    records = [
        {"step": 1, "loss": 2.5, "tokens_per_second": 1280.0, "chip_seconds": 7.0},
        {"step": 2, "eval_loss": 3.25},
        {"step": 2, "event": "save_slow", "seconds": 3},
    ]
    path = run / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))

    def changes():
        yield from of_text(path.read_bytes())
        for changed in itertools.chain(mutations.of_json(records, COUNT), of_sizes(records)):
            lines = changed if isinstance(changed, list) else [changed]
            yield b"\n".join(map(dumped, lines))

    count = itertools.count()

    def act():
        describe(epath.Path(step), late)
        if next(count) % 100 == 0:
            plot_loss(epath.Path(path), epath.Path(tmp_path / "loss.png"))

    content = list(changes())
    none(failures(path, content, act))


@pytest.mark.parametrize("read", [read_prompts, read_messages])
def test_prompts(tmp_path, read):
    prompts = [{"prompt": "a"}, {"prompt": "b", "id": 3}]
    messages = [WITH_SYSTEM, {"messages": WITH_SYSTEM}]
    records = prompts if read is read_prompts else messages
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))

    def changes():
        yield from of_text(path.read_bytes())
        for changed in mutations.of_json(records, COUNT):
            yield b"\n".join(map(dumped, changed if isinstance(changed, list) else [changed]))

    none(failures(path, list(changes()), lambda: read(path)))


def test_a_checkpoint_to_begin_with(run):
    """`init_from` opens it as `convert` does."""
    path = run / "checkpoints" / "0" / "meta" / "metadata"
    config = replace(CONFIG, init_from=f"ckpt:{run}")
    none(failures(path, mutations.of_bytes(path.read_bytes(), 30), lambda: open_init(config)))
