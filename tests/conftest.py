"""What every test runs under: one thread, fixed seeds, NaN in every uninitialised tensor, no network."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too: two test workers share two cores
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.insert(0, str(Path(__file__).parent))  # for families.py, which several folders share

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton: without a GPU its kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

import transformers
from hypothesis import HealthCheck, settings

SHARED_MODELS = Path(__file__).resolve().parents[2] / "shared" / "data" / "models"

transformers.logging.set_verbosity_error()
settings.register_profile(
    "trilobit", deadline=None, max_examples=60, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
settings.load_profile("trilobit")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--models", type=Path, default=SHARED_MODELS, help="folder of real checkpoints, such as stories260K")


@pytest.fixture(autouse=True)
def same_everywhere() -> Iterator[None]:
    """One thread and one seed; torch.empty gives NaN (int8: 127), so that reading what was never written shows."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def stories260k(request: pytest.FixtureRequest) -> Path:
    """The real checkpoint stories260K, or a skip that says where it was looked for."""
    path = request.config.getoption("--models") / "stories260K"
    if not (path / "model.safetensors").exists():
        pytest.skip(f"{path} has no checkpoint; give its folder with --models")
    return path
