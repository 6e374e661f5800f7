"""What a run needs of its environment, checked before anything is done."""

from __future__ import annotations

from importlib.util import find_spec

from transformers.integrations import get_available_reporting_integrations

from daemon.fingerprint import minor_version
from daemon.job import FailureKind
from daemon.recipe import Recipe
from daemon.trainer.errors import RunFailure

# What a resume relies on: checkpoints loaded by weights alone, and a Trainer whose silences are known.
MIN_RESUME_VERSIONS = {"torch": (2, 10), "transformers": (5, 0)}


def require_packages(recipe: Recipe) -> None:
    """Raise RunFailure(CONFIG) when the recipe needs a package that is not installed."""
    if recipe.training.use_liger_kernel and find_spec("liger_kernel") is None:
        raise RunFailure(
            FailureKind.CONFIG,
            "use_liger_kernel needs the package liger-kernel",
            hint="`pip install 'dropforge[gpu]'`, or use_liger_kernel = false under [training]",
        )
    missing = external_reporters(recipe) - {*get_available_reporting_integrations(), "all", "none"}
    if missing:
        raise RunFailure(
            FailureKind.CONFIG,
            f"report_to names {', '.join(sorted(missing))}, whose package is not installed",
            hint="install it into the trainer's environment, or take it out of report_to under [training]",
        )


def external_reporters(recipe: Recipe) -> set[str]:
    """Return where transformers reports the run to; TensorBoard files are ours and written for every run."""
    return set(recipe.training.report_to) - {"tensorboard"}


def require_resume_support() -> None:
    """Raise RunFailure(CONFIG) when the libraries are older than those whose way of loading a checkpoint is known."""
    for package, oldest in MIN_RESUME_VERSIONS.items():
        installed = minor_version(package) or "0.0"
        if tuple(map(int, installed.split(".")[:2])) < oldest:
            raise RunFailure(
                FailureKind.CONFIG,
                f"a run cannot be resumed with {package} {installed}",
                hint=f"install {package} {'.'.join(map(str, oldest))} or newer into the trainer's environment",
            )
