"""Every class of torch.optim, and those of libraries that are installed: it trains and resumes, or is refused."""

import json
from pathlib import Path

import pytest

from tests.measure.optimizers import LIBRARIES, PRECISIONS, of_torch, tried

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ("bitsandbytes", "grokadamw", "reference")
IMPORTED = {"lion-pytorch": "lion_pytorch", "torch-optimi": "optimi", "pytorch-optimizer": "pytorch_optimizer"}
REFUSED = {
    "torch.optim.LBFGS": "torch.optim.LBFGS computes the loss several times per step, through a closure",
    "torch.optim.SparseAdam": "torch.optim.SparseAdam cannot make a step with --train.optimizer_args",
    "pytorch_optimizer.Muon": "pytorch_optimizer.Muon refused its arguments {'lr': 0.005}: `use_muon` must be set.",
}
NO_BIAS = ("bitsandbytes.optim.LAMB8bit", "bitsandbytes.optim.LARS8bit")  # a tensor that starts at zero stays there
COARSE = ("pytorch_optimizer.Prodigy",)  # its first rates are lost in the rounding of 16-bit weights
pytestmark = pytest.mark.filterwarnings(
    "default::UserWarning",  # what other libraries warn of is theirs
    "default::DeprecationWarning",
    "default::FutureWarning",
    # The last filter wins. Known, and of no interest here, where the CPU is all that there is:
    "ignore:.*torch.cuda.amp.autocast:FutureWarning",
    "ignore:CUDA is not available",
    "ignore:Paged optimizers are not supported on CPU",
    "ignore:.*torch.jit.*:DeprecationWarning",
)


def judge(path: str, precision: str, folder: Path) -> None:
    seen = tried(path, precision, folder)
    if path in REFUSED:
        assert seen.refused.startswith(REFUSED[path])
        return
    assert not seen.refused
    assert seen.resumes
    if path in NO_BIAS:
        assert seen.still
        assert all(name.endswith("bias") for name in seen.still)
    elif path not in COARSE or precision == "32-true":
        assert seen.trains, seen


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("path", [*of_torch(), *(path for name in DEFAULT for path in LIBRARIES[name])])
def test_a_class_trains_and_resumes_or_is_refused(path: str, precision: str, tmp_path: Path) -> None:
    judge(path, precision, tmp_path)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("package", "path"), [(name, path) for name in LIBRARIES if name not in DEFAULT for path in LIBRARIES[name]]
)
def test_a_class_of_an_optional_library_does(package: str, path: str, precision: str, tmp_path: Path) -> None:
    pytest.importorskip(IMPORTED.get(package, package))
    judge(path, precision, tmp_path)


def test_a_state_that_is_lost_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reference.training.saving.load_optimizer_state", lambda *_: None)
    assert tried("torch.optim.AdamW", "32-true", tmp_path).resumes is False


def test_a_committed_row_is_what_a_class_does_today(tmp_path: Path) -> None:
    rows = json.loads((ROOT / "reports/optimizers/classes-cpu.json").read_text(encoding="utf-8"))["rows"]
    assert set(of_torch()) <= set(rows)
    seen, row = tried("torch.optim.Muon", "32-true", tmp_path), rows["torch.optim.Muon"]["32-true"]
    assert (seen.trains, seen.resumes, seen.state_bytes) == (row["trains"], row["resumes"], row["state_bytes"])
