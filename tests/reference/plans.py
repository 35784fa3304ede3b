"""The homes of every config, a TPU slice and a GPU cluster on which it fits, and their plans.

`python -m tests.reference.plans` compiles the homes whose compilers are installed (`.[tpu]`,
`.[cuda13]`: two minutes of a core for a TPU, a quarter of an hour for a v6e, 20 seconds for GPUs).
It writes tests/goldens/plans/*.json, the lines about the plans in the docstrings of configs/*.py,
and the tables of benchmarks/README.md and docs/finetuning.md. `python -m tests.reference.plans
65b-v5p-1024` compiles one home.
"""

import dataclasses
import json
import re
import sys

from llama_jax.hardware.topology import parse_topology
from tests.helpers import ROOT, replace, run_command
from tests.test_config import load

GOLDENS = ROOT / "tests" / "goldens" / "plans"


@dataclasses.dataclass(frozen=True)
class Home:
    """A config, a topology, and the flags with which the config fits on the topology."""

    config: str
    topology: str
    flags: tuple[str, ...] = ()

    @property
    def name(self):
        name = f"{self.config}-{re.sub('[:]', '-', self.topology)}"
        return f"published-{name}" if self in PUBLISHED else name

    @property
    def marker(self):
        """The pytest marker of the environment that has the compiler."""
        return "tpu" if parse_topology(self.topology).chip.torus else "gpu"

    @property
    def loaded(self):
        """The config with the flags applied."""
        changes = {}
        for flag in self.flags:
            if flag.startswith("--config."):
                name, value = flag.removeprefix("--config.").split("=", 1)
                changes[name.replace(".", "__")] = int(value) if value.isdigit() else value
        return replace(load(self.config)[0], **changes)

    @property
    def command(self):
        lines = [f"--config=configs/{self.config}.py", f"--topology={self.topology}", *self.flags]
        return ["python -m llama_jax.plan", *lines]


def _save(names):
    return f"--config.model.remat=save:{names}"


def _accumulate(times):
    return f"--config.train.grad_accum={times}"


_HOPPER = "--xla_preset=hopper"  # TPUs take their preset by default
_ALL = _save("q,k,v,attn_context,attn_out,mlp_gate,mlp_up")
_ATTENTION = _save("q,k,v,attn_context")
_UP = _save("q,k,v,attn_context,mlp_up")
_OFFLOAD = "--config.model.remat=offload:block_in,q,k,v"
_MLP = _save("q,k,v,attn_context,mlp_gate,mlp_up")
PRETRAINING = (
    Home("7b", "v5p-128", (_ALL, _accumulate(4))),
    Home("7b", "h100:16x8", (_HOPPER, _MLP, _accumulate(2))),
    Home("13b", "v5p-256", (_ALL, _accumulate(2))),
    Home("13b", "h100:32x8", (_HOPPER, _MLP, _accumulate(2))),
    Home("33b", "v5p-512", ("--config.mesh.data=4", _ALL, _accumulate(2))),
    Home("33b", "h100:128x8", (_HOPPER, _MLP, "--config.mesh.data=4")),
    Home("65b", "v5p-1024", (_save("mlp_gate,mlp_up,attn_out,q"),)),
    Home("65b", "v4-2048", (_save("mlp_up"),)),
    Home("65b", "a100-80g:256x8", ("--xla_preset=ampere", _MLP, "--config.mesh.data=8")),
)


def _context(size):
    return f"--config.mesh.context={size}"


# LLaMA's successors, each on one slice and one cluster.
FAMILY = (
    Home("llama2_7b", "v5p-128", (_ALL, _accumulate(4))),
    Home("llama2_7b", "h100:16x8", (_HOPPER, _MLP, _accumulate(2))),
    Home("llama2_13b", "v5p-256", (_ALL, _accumulate(2))),
    Home("llama2_13b", "h100:32x8", (_HOPPER, _MLP, _accumulate(2))),
    Home("llama2_70b", "v5p-1024", (_save("mlp_up,attn_out,q"),)),
    Home("llama2_70b", "h100:128x8", (_HOPPER, _UP, "--config.mesh.data=4")),
    Home("codellama_7b", "v5p-128", (_ALL, _accumulate(4))),
    Home("codellama_7b", "h100:16x8", (_HOPPER, _MLP, _accumulate(2))),
    Home("codellama_13b", "v5p-256", (_ALL, _accumulate(2))),
    Home("codellama_13b", "h100:32x8", (_HOPPER, _ATTENTION)),
    Home("codellama_34b", "v5p-512", (_save("mlp_up,attn_out,q"),)),
    Home("codellama_34b", "h100:32x8", (_HOPPER, _ATTENTION)),
    Home("codellama_70b", "v5p-512", (_save("attn_out,q"),)),
    Home("codellama_70b", "h100:32x8", (_HOPPER, _save("attn_context"))),
    Home("llama3_8b", "v5p-128", (_ALL, _accumulate(4))),
    Home("llama3_8b", "h100:16x8", (_HOPPER, _MLP, _accumulate(2))),
    Home("llama3_70b", "v5p-1024", (_save("mlp_up,attn_out,q"),)),
    Home("llama3_70b", "h100:64x8", (_HOPPER, _ATTENTION)),
    Home("llama3_1_8b", "v5p-128", (_ATTENTION, _context(2))),
    Home("llama3_1_8b", "h200:4x8", (_HOPPER, _save("attn_context"))),
    Home("llama3_1_70b", "v5p-512", (_ATTENTION, _context(8))),
    Home("llama3_1_70b", "h200:64x8", (_HOPPER, _context(16))),
    Home("llama3_1_405b", "v5p-2048", (_ATTENTION, _context(32))),
    Home("llama3_1_405b", "h200:128x8", (_HOPPER, _context(32))),
    Home("llama3_2_1b", "v5p-128", (_UP, _context(2))),
    Home("llama3_2_1b", "h100:4x8", (_HOPPER, _ATTENTION)),
    Home("llama3_2_3b", "v5p-128", (_ATTENTION, _context(2))),
    Home("llama3_2_3b", "h100:4x8", (_HOPPER, _save("attn_context"))),
    Home("mistral_7b_v0_1", "v5p-128", (_UP, _accumulate(2))),
    Home("mistral_7b_v0_1", "h100:16x8", (_HOPPER, _ATTENTION)),
    Home("mistral_7b_v0_3", "v5p-128", (_UP, _accumulate(2))),
    Home("mistral_7b_v0_3", "h100:16x8", (_HOPPER, _ATTENTION)),
)
FINETUNING = (
    Home("alpaca_7b", "v5p-16"),
    Home("alpaca_7b", "h100:1x8"),
    Home("alpaca_7b", "a100-80g:1x8"),
    Home("alpaca_7b", "rtx4090:1x1", ("--config.lora.rank=16", _accumulate(5))),
    Home("vicuna_7b", "v5p-16"),
    Home("vicuna_7b", "h100:1x8", (_accumulate(2),)),
    Home("guanaco_7b_qlora", "v5e:2x2"),
    Home("guanaco_7b_qlora", "rtx4090:1x1"),
    Home("guanaco_65b_qlora", "v5e:4x4", (_accumulate(1),)),
    Home("guanaco_65b_qlora", "l40s:1x1"),
)
SMALL = (
    Home("tiny", "v5e:2x2"),
    Home("tiny", "rtx4090:1x1"),
    Home("tiny_quiz", "v5e:2x2"),
    Home("tiny_quiz", "rtx4090:1x1"),
)


def _published(config, topology, seq_len, batch, *flags):
    shape = (f"--config.train.seq_len={seq_len}", f"--config.train.global_batch={batch}")
    return Home(config, topology, (*shape, *flags))


# The shapes, batches and remat policies of published runs of another program: `calibration.SHAPES`.
PUBLISHED = (
    _published("llama2_70b", "v5p-1024", 4096, 2048, _save("q,k,v,attn_out")),
    _published("llama2_70b", "v6e-256", 4096, 1024),
    _published("llama3_1_70b", "v6e-256", 8192, 1024, "--xla_preset=v6e-offload", _OFFLOAD),
    _published("llama3_1_405b", "v5p-1024", 8192, 1024),
)
HOMES = PRETRAINING + FAMILY + FINETUNING + SMALL
ALPACA_TOKENS = 1_218 * 40 * 512  # as in alpaca_7b.py: three times 52,002 records


def compile_plan(home):
    """Returns the object that `plan --json` prints for a home."""
    _, *arguments = home.command
    process = run_command("plan", *arguments, "--json", timeout=3600, XLA_FLAGS="")
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def summary(result):
    """Returns the part of a plan that should show in a diff, with rounded numbers."""
    hours = result["chip_hours"]
    sizes = {name: round(size / 2**30, 2) for name, size in result["bytes_per_chip"].items()}
    return {
        "fits": result["fits"],
        "gib_per_chip": sizes,
        "collectives": {
            kind: {"count": one["count"], "gb": round(one["bytes"] / 1e9, 2)}
            for kind, one in result["collectives_by_dtype"].items()
        },
        "lookup_collectives": result["lookup_collectives"],
        "sharding_constraints": result["sharding_constraints"],
        "warnings": result["warnings"],
        "asynchronous": {kind: one["count"] for kind, one in result["collectives_async"].items()},
        "tflop_per_chip": round(result["flops_per_chip"] / 1e12, 1),
        "step_seconds": round(result["step_seconds"], 2),
        "exposed_seconds": round(result["seconds"]["network_exposed"], 2),
        "tokens_per_second_per_chip": round(result["tokens_per_second_per_chip"]),
        "mfu_6n": round(result["mfu_6n"], 3),
        "mfu_attention": round(result["mfu_attention"], 3),
        "days": round(result["days"], 1),
        "chip_hours": round(hours) if hours >= 100 else round(hours, 2),
    }


def golden(home):
    """Returns the stored summary."""
    return json.loads((GOLDENS / f"{home.name}.json").read_text())


def hours(home):
    """Returns the predicted hours of a whole run."""
    return golden(home)["chip_hours"] / parse_topology(home.topology).chips


def docstring_lines(home):
    """Returns the lines about a home in the config's docstring."""
    stored = golden(home)
    sizes = stored["gib_per_chip"]
    rule = "4N" if "frozen" in sizes or load(home.config)[0].lora.rank else "6N"
    long = f"{hours(home):.2f} hours" if home in FINETUNING else f"{stored['days']:.0f} days"
    lines = [""]
    for word in home.command:
        if len(lines[-1]) + len(word) > 90 and lines[-1].strip():
            lines[-1] += " \\\\"
            lines.append("     ")
        lines[-1] += f" {word}" if lines[-1] else f"  {word}"
    return [
        *lines,
        f"    {sizes['total']:.1f} of {sizes['capacity']:.1f} GiB a chip; predicted "
        f"{stored['step_seconds']:.2f} s a step, {stored['tokens_per_second_per_chip']:,} "
        f"tokens/s/chip,",
        f"    MFU {stored['mfu_6n']:.1%} ({rule}), {long}, {stored['chip_hours']:,} chip hours.",
    ]


def docstring(config):
    """Returns the part of a config's docstring that lists its homes."""
    lines = ["Fits, as the compilers of these machines say (tests/reference/plans.py checks it):"]
    for home in HOMES:
        if home.config == config:
            lines += docstring_lines(home)
    return "\n".join(lines) + "\n"


def write_docstring(config):
    """Writes `docstring` to the end of the config's own docstring."""
    path = ROOT / "configs" / f"{config}.py"
    text = re.sub(r'Fits, as the compilers.*?(?=""")', "", path.read_text(), count=1, flags=re.S)
    head, rest = text[3:].split('"""', 1)
    path.write_text(f'"""{head}{docstring(config)}"""{rest}')


def table(homes):
    """Returns the rows of a table in benchmarks/README.md."""
    rows = []
    for home in homes:
        stored, sizes = golden(home), golden(home)["gib_per_chip"]
        flags = " ".join(f"`{flag.removeprefix('--config.')}`" for flag in home.flags)
        cells = [
            f"`{home.config}`",
            f"`{home.topology}`",
            flags,
            f"{sizes['arguments']:.2f} + {sizes['temporaries']:.2f}",
            f"{sizes['capacity']:.1f}",
            f"{stored['step_seconds']:.2f} s",
            f"{stored['exposed_seconds']:.2f} s",
            f"{stored['tokens_per_second_per_chip']:,}",
            f"{stored['mfu_6n']:.1%}",
            f"{stored['mfu_attention']:.1%}",
            f"{stored['days']:,.0f}",
        ]
        rows.append("| " + " | ".join(cells).replace("|  |", "| |") + " |")
    return "\n".join(rows) + "\n"


def finetuning_table():
    """Returns the rows of docs/finetuning.md, for Alpaca's number of tokens."""
    rows = []
    for home in FINETUNING:
        stored, sizes = golden(home), golden(home)["gib_per_chip"]
        rate, chips = stored["tokens_per_second_per_chip"], parse_topology(home.topology).chips
        chip_hours = ALPACA_TOKENS / rate / 3600
        cells = [
            f"`{home.config}`",
            " ".join(f"`{flag.removeprefix('--config.')}`" for flag in home.flags),
            f"`{home.topology}`",
            f"{sizes['total']:.2f}",
            f"{sizes['capacity']:.1f}",
            f"{rate:,}",
            f"{chip_hours / chips:.2f}",
            f"{chip_hours:.2f}",
        ]
        rows.append("| " + " | ".join(cells).replace("|  |", "| |") + " |")
    return "\n".join(rows) + "\n"


# Tables of pages: (page, heading, rows). The rows begin under the line of dashes after the heading.
TABLES = (
    ("benchmarks/README.md", "| config | topology | flags |", lambda: table(PRETRAINING)),
    ("benchmarks/README.md", "| successor | topology | flags |", lambda: table(FAMILY)),
    ("docs/finetuning.md", "| config | flags | topology |", finetuning_table),
)


def page_with_tables(page):
    """Returns the text of a page with all its tables made from the goldens."""
    text = (ROOT / page).read_text()
    for path, heading, rows in TABLES:
        if path == page:
            found = re.search(
                rf"^{re.escape(heading)}.*\n\|[-|: ]+\n((?:\|.*\n)*)", text, flags=re.M
            )
            text = text[: found.start(1)] + rows() + text[found.end(1) :]
    return text


def main(names):
    """Compiles the homes with these names, or all, and writes the results."""
    GOLDENS.mkdir(exist_ok=True)
    for home in (*HOMES, *PUBLISHED):
        if names and home.name not in names:
            continue
        try:
            found = summary(compile_plan(home))
        except AssertionError as error:
            print(f"{home.name}: {str(error).strip()[:200]}")
            continue
        (GOLDENS / f"{home.name}.json").write_text(json.dumps(found, indent=2) + "\n")
        print(home.name, flush=True)
    for config in dict.fromkeys(home.config for home in HOMES):
        if all((GOLDENS / f"{home.name}.json").exists() for home in HOMES if home.config == config):
            write_docstring(config)
    if all((GOLDENS / f"{home.name}.json").exists() for home in HOMES):
        for page in dict.fromkeys(page for page, _, _ in TABLES):
            (ROOT / page).write_text(page_with_tables(page))


if __name__ == "__main__":
    main(sys.argv[1:])
