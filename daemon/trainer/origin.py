"""What a run starts from: the base model as it is now, and the version that it continues, both proven before any token.

A version is continued only as it was promoted, and only on the base model that it was trained on. Torch-free, so that
another engine (the tests' quick one) is held to the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from daemon import versions
from daemon.base_identity import (
    BaseIdentity,
    BaseModel,
    BasePart,
    base_change,
    changed_parts,
    expand_home,
    find_base,
    identify_base,
    recorded_base,
    remembered,
)
from daemon.errors import DropforgeError
from daemon.job import FailureKind, RunSpec
from daemon.lineage import read_lineage
from daemon.recipe import ModelSettings, Recipe
from daemon.trainer.base_model import resolve_base
from daemon.trainer.errors import RunFailure
from daemon.versions import Version

UNPROVEN_HINT = 'put that base back, or set start_from = "base" under [training] to begin a new adapter'


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Base model and parent of a run."""

    base: BaseIdentity
    parent: Version | None  # None: a fresh adapter on the base model
    warnings: tuple[str, ...] = ()  # what could not be proven, or was accepted


def require_base(spec: RunSpec, recipe: Recipe) -> BaseModel:
    """Return the base model.

    Raises RunFailure(BASE) when it cannot be used, RunFailure(IDENTITY) when it could before: the current version was trained
    on what has its name.
    """
    root = Path(spec.root) if spec.root else None
    lost = _lost_base(spec, recipe, root) if find_base(recipe.model, root) is None else None
    if lost is not None:  # before the Hub is asked for a model that is called like the folder
        raise lost
    try:
        return resolve_base(recipe.model, root)
    except RunFailure as failure:
        lost = _lost_base(spec, recipe, root) if failure.kind is FailureKind.BASE else None
        raise failure if lost is None else lost from None


def _lost_base(spec: RunSpec, recipe: Recipe, root: Path | None) -> RunFailure | None:
    """The failure of a base model in a folder that the current version was trained on, and that is no model now."""
    if recipe.training.start_from != "latest" or (parent := find_parent(Path(spec.model_dir))) is None:
        return None
    recorded, name = recorded_base(versions.promotion_record(parent)), recipe.model.model_name_or_path
    folder = (root or Path("/")) / expand_home(name)
    named = BaseModel(name=str(folder), path=folder, revision=None, root=root).portable_name
    if recorded is None or recorded.commit is not None or recorded.name != named:
        return None
    return RunFailure(
        FailureKind.IDENTITY,
        f"version {parent.name} was trained on {named}, and {folder} "
        + ("holds no whole model now" if folder.is_dir() else "is missing"),
        hint="mount it or bring it back; the daemon goes on by itself",
    )


def find_origin(spec: RunSpec, recipe: Recipe, base: BaseModel) -> Origin:
    """Digest the base model, and verify the version that the run continues.

    Raises RunFailure(IDENTITY) when that version is damaged, or was trained on another base.
    """
    identity = _identify(base, spec.state_dir)
    if recipe.training.start_from != "latest":
        return Origin(base=identity, parent=None)
    parent = find_parent(Path(spec.model_dir))
    if parent is None:
        return Origin(base=identity, parent=None)
    require_undamaged(parent)
    altered = read_lineage(Path(spec.model_dir)).broken
    return Origin(
        base=identity, parent=parent, warnings=(*altered, *require_same_base(parent, base, identity, recipe.model))
    )


def require_as_proven(origin: Origin, base: BaseModel, state_dir: str) -> None:
    """Raise RunFailure(LOST) unless base model and parent still are what they were before they were loaded."""
    if origin.parent is not None:
        require_undamaged(origin.parent)
    if changed := changed_parts(origin.base, _identify(base, state_dir)):
        raise RunFailure(
            FailureKind.LOST,
            f"the base model's {', '.join(changed)} changed while the run began",
            hint="the job is tried again with what is there then",
        )


def _identify(base: BaseModel, state_dir: str) -> BaseIdentity:
    return identify_base(base, *([remembered(Path(state_dir))] if state_dir else []))


def find_parent(model_dir: Path) -> Version | None:
    """Return the current version, None before the first. Raises RunFailure(IDENTITY) when that cannot be told."""
    try:
        return versions.current_version(model_dir)
    except DropforgeError as error:
        raise RunFailure(FailureKind.IDENTITY, error.sentence, hint=error.hint) from error


def require_undamaged(version: Version) -> None:
    """Raise RunFailure(IDENTITY), naming the files and the ways out, unless a version is as it was promoted."""
    if damage := versions.damage(version):
        parent = str(versions.promotion_record(version).get("parent") or "")
        other = (
            f"go on from version {parent} with `dropforge rollback {parent}`"
            if parent and (version.path.parent / parent).is_dir()
            else 'set start_from = "base" under [training] to begin a new adapter'
        )
        raise RunFailure(FailureKind.IDENTITY, "; ".join(damage), hint=f"bring it back from a backup, or {other}")


def require_same_base(version: Version, base: BaseModel, found: BaseIdentity, model: ModelSettings) -> tuple[str, ...]:
    """Raise RunFailure(IDENTITY), naming both, unless a version was trained on the base model that is there now.

    Returns warnings: of a version of before bases were recorded, of a template that the settings accept, of another commit
    with the same contents.
    """
    recorded = recorded_base(versions.promotion_record(version))
    if recorded is None:
        return _without_record(version, base, found)
    change = base_change(version.name, recorded, found)
    if change is None:
        if recorded.commit and found.commit and recorded.commit != found.commit:
            return (f"the base model {recorded.describe(())} has become {found.describe(())}, with the same contents",)
        return ()
    if change.parts == (BasePart.CHAT_TEMPLATE,) and model.allow_template_change:
        return (f"{change.message}; allow_template_change is set, and it was continued",)
    raise RunFailure(FailureKind.IDENTITY, change.message, hint=change.hint)


def _without_record(version: Version, base: BaseModel, found: BaseIdentity) -> tuple[str, ...]:
    """Judge by what the adapter itself names: a Hub id and commit, or a folder that is still there."""
    name, commit = versions.named_base(version)
    folder = Path(name)
    if folder.is_absolute():  # what it holds now; where it is gone, nothing can be told: a root may have been moved
        is_other = folder != base.path and folder.is_dir() and bool(changed_parts(identify_folder(folder), found))
    else:
        is_other = bool(name) and (name, commit or found.commit) != (found.name, found.commit)
    if is_other:
        raise RunFailure(
            FailureKind.IDENTITY,
            f"version {version.name} was trained on {name!r}{f' at {commit}' if commit else ''}, and {found.name!r}"
            f"{f' at {found.commit}' if found.commit else ''} is configured",
            hint=UNPROVEN_HINT,
        )
    return (
        f"version {version.name} does not record the base model that it was trained on (it names {name or 'none'});"
        f" it was taken for {found.describe(())}, as it is now",
    )


def identify_folder(folder: Path) -> BaseIdentity:
    """Digest the base model in a folder."""
    return identify_base(BaseModel(name=str(folder), path=folder, revision=None))
