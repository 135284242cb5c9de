"""`hf_speed.export`: from a checkpoint, a URL or a model in training to a plain Hub model.

    checkpoint or URL   checkpoint.export: files copied or rewritten, one tensor in memory
    model, engine       every rank writes its own files, as at a save
    then                the model card, and with push_to_hub one commit on the Hub

Nothing is published that is not whole: a directory appears by rename, a commit is one.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_speed.checkpoint.export import (
    DEFAULT_SHARD_BYTES,
    Exported,
    ExportOptions,
    files_in,
    publish_directory,
    require_empty,
    staging_of,
)
from hf_speed.checkpoint.export import export as export_directory
from hf_speed.checkpoint.plan import INDEX_NAME, SINGLE_NAME, ModelPlan
from hf_speed.checkpoint.remote import localized
from hf_speed.checkpoint.saver import Saver
from hf_speed.checkpoint.staging import agreed
from hf_speed.checkpoint.stores import is_url
from hf_speed.engine import Engine, engine_of
from hf_speed.engine.state import run_meta
from hf_speed.errors import CheckpointError, ConfigError
from hf_speed.integrations.hub.card import CARD_NAME, CardFacts, facts_of_checkpoint, write_card
from hf_speed.logs import get_logger
from hf_speed.mesh import AxisGroup
from hf_speed.mesh.axes import IDENTITY
from hf_speed.mesh.collectives import broadcast_object

_log = get_logger(__name__)

_STALE = [SINGLE_NAME, INDEX_NAME, "model-?????-of-?????.safetensors"]
"""Files of an earlier model in the repository: of other names, they would be loaded instead."""


class HubTarget(NamedTuple):
    """Where a model goes on the Hub.

    Attributes:
        repo_id: as in "my-org/my-model".
        revision: branch, made if absent; None: the main one.
        private: of a repository that is made now; None: the Hub's default.
        message: of the commit.
    """

    repo_id: str
    revision: str | None
    private: bool | None
    message: str


def export(
    src: str | Path | nn.Module | Engine,
    dst: str | Path,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str | None = None,
    *,
    push_to_hub: bool = False,
    revision: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
) -> Exported:
    """Write a plain Hub model, which `from_pretrained` loads without hf_speed.

    Memory beside the model that is there already: one file's worth. With a README.md that says how
    the model was trained, unless there is one.

    Args:
        src: a checkpoint of hf_speed or any directory with safetensors weights; a URL of one, as in
            "s3://bucket/run/checkpoint-100"; a model or its engine. A model that is prepared is
            written by all ranks together: collective. One that is not: call it on one process.
        dst: a directory, absent or empty; with push_to_hub the name of a repository on the Hub.
        dtype: of the floating-point weights, as in torch.bfloat16 or "bfloat16"; None: as they are.
            float32 of 16-bit weights has the bits of the masters, where these are at hand.
        max_shard_size: bytes, or as in "5GB" and "512MiB"; None: the files as they are.
        push_to_hub: commit to the Hub instead of writing a directory. The token is that of
            `hf auth login`, or HF_TOKEN.
        revision: branch to commit to, made if absent; None: the main one.
        private: whether a repository that does not exist yet is made private.
        commit_message: of the one commit.

    Raises:
        CheckpointError: `src` has no weights, or is not whole; the disk or the Hub refuses.
        ConfigError: arguments that mean nothing or have no effect, or `dst` is not empty.
    """
    options = ExportOptions.parse(dtype, max_shard_size)
    target = None
    if push_to_hub:
        target = HubTarget(
            _repo_id(dst), revision, private, commit_message or "Upload model trained with hf_speed"
        )
    elif is_url(str(dst)):
        raise ConfigError(
            f"export: dst={str(dst)!r} is an address. Export to a directory and copy that, or to "
            f"the Hub with push_to_hub=True and a name as in 'my-org/my-model'."
        )
    elif (revision, private, commit_message) != (None, None, None):
        raise ConfigError(
            "export: revision, private and commit_message are of a commit on the Hub and have no "
            "effect on a directory. Set push_to_hub=True, or leave them out."
        )
    if isinstance(src, (nn.Module, Engine)):
        return _export_live(src, dst, options, target)
    return _export_stored(src, dst, options, target)


# ---- from files ----


def _export_stored(
    src: str | Path, dst: str | Path, options: ExportOptions, target: HubTarget | None
) -> Exported:
    if target is not None:
        prepare_repository(target)  # Before the work: a wrong token should not cost an hour.
    with contextlib.ExitStack() as stack:
        if target is None:
            home = Path(dst)
            require_empty(home)
            # Beside the target: a temporary directory may be in memory, or too small.
            room = home.parent
        else:
            room = Path(stack.enter_context(_scratch()))
            home = room / "model"
        source = Path(src) if not is_url(src) else stack.enter_context(localized(str(src), room))
        name = target.repo_id.rpartition("/")[2] if target is not None else home.resolve().name
        facts = facts_of_checkpoint(source, name)
        exported = export_directory(
            source,
            home,
            options.cast,
            options.max_shard_bytes,
            layout=_layout_of,
            finish=partial(write_card, facts=facts),
        )
        if target is None:
            return exported
        is_ours = not (source / CARD_NAME).exists()
        url = push(home, target, has_made_card=is_ours)
        return exported._replace(directory=None, url=url)


def _layout_of(source: Path) -> ModelPlan | None:
    """How the model of a checkpoint is laid out on the Hub; None where transformers cannot say."""
    # Here, not at the top: it imports all of transformers, which a copy does not need.
    from hf_speed.integrations.transformers.describe import meta_model
    from hf_speed.integrations.transformers.hub import plan_hub_model

    try:
        return plan_hub_model(meta_model(str(source)), dtype=torch.float32)
    except (ConfigError, CheckpointError, ValueError, AttributeError) as error:
        _log.warning("%s: its model cannot be made without weights: %s", source, error)
        return None


# ---- from a model ----


def _export_live(
    src: nn.Module | Engine, dst: str | Path, options: ExportOptions, target: HubTarget | None
) -> Exported:
    engine = src if isinstance(src, Engine) else engine_of(src)
    model = src.model if isinstance(src, Engine) else src
    world = IDENTITY if engine is None else engine.mesh.world
    what = f"Exporting {type(model).__name__} to {dst}"
    staging = _agree_on_staging(engine, dst, target, world, what)
    try:
        _write_live(model, engine, staging, options)
        url = None
        with agreed(world, what):
            if world.rank == 0:
                url = _finish_live(model, engine, staging, dst, target)
        files = () if world.rank else files_in(staging if target else Path(dst))
        done = Exported(None if target else Path(dst), files, (), url)
        return done if engine is None else broadcast_object(done, group=world, device=_cpu(engine))
    finally:
        if world.rank == 0:
            shutil.rmtree(staging.parent if target is not None else staging, ignore_errors=True)


def _cpu(engine: Engine) -> torch.device:
    return engine.mesh.device


def _agree_on_staging(
    engine: Engine | None,
    dst: str | Path,
    target: HubTarget | None,
    world: AxisGroup,
    what: str,
) -> Path:
    """An empty directory that all ranks know. Collective."""
    staging = None
    with agreed(world, what):
        if world.rank == 0:
            if target is not None:
                prepare_repository(target)
                staging = Path(tempfile.mkdtemp(prefix="hf_speed-export-")) / "model"
            else:
                require_empty(Path(dst))
                staging = staging_of(Path(dst))
                shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
    if engine is not None:
        staging = broadcast_object(staging, group=world, device=_cpu(engine))
    if staging is None:
        raise CheckpointError(f"{what} failed: rank 0 named no directory.")
    return staging


def _write_live(
    model: nn.Module, engine: Engine | None, staging: Path, options: ExportOptions
) -> None:
    """Weights and configs, from all ranks. Collective."""
    # Here, not at the top: it imports all of transformers, which an export of files does not need.
    from hf_speed.integrations import weights
    from hf_speed.integrations.transformers.hub import save_hub_model

    what = f"Exporting {type(model).__name__}"
    limit = options.max_shard_bytes or DEFAULT_SHARD_BYTES
    if weights.is_peft(model):
        if not options.is_copy:
            raise ConfigError(
                f"{type(model).__name__} carries PEFT adapters, which are exported as they are: "
                f"leave out dtype and max_shard_size."
            )
        if engine is not None:
            weights.write_model(engine, str(staging))
        else:
            peft: Any = model
            peft.save_pretrained(str(staging))
    elif engine is None:
        values = ((name, value.detach()) for name, value in model.named_parameters())
        save = Saver(IDENTITY, is_behind=False).begin(what)
        save_hub_model(model, staging, values, save=save, max_shard_bytes=limit, dtype=options.cast)
    else:
        dtype = options.cast or weights.file_dtype(engine)
        save_hub_model(
            model,
            staging,
            engine.full_parameters(master=dtype is not None),
            save=engine.saves.at_once(what),
            buffers=weights.full_buffers(engine),
            max_shard_bytes=options.max_shard_bytes or engine.config.max_shard_bytes,
            dtype=dtype,
            tensors=weights.stored_tensors(engine),
        )


def _finish_live(
    model: nn.Module,
    engine: Engine | None,
    staging: Path,
    dst: str | Path,
    target: HubTarget | None,
) -> str | None:
    """On rank 0: the card, then the rename or the commit; the commit's address."""
    name = Path(dst).resolve().name if target is None else target.repo_id.rpartition("/")[2]
    meta = {} if engine is None else run_meta(engine)
    size = None if engine is None else engine.mesh.world.size
    config: Any = getattr(model, "config", None)
    about = {"architectures": [type(model).__name__]} if config is not None else {}
    is_ours = write_card(staging, CardFacts(name, meta, size, {}, about))
    if target is None:
        publish_directory(staging, Path(dst))
        return None
    return push(staging, target, has_made_card=is_ours)


# ---- the Hub ----


def _repo_id(dst: str | Path) -> str:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = str(dst)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(
            f"export: with push_to_hub=True dst={name!r} must be a repository on the Hub, as in "
            f"'my-org/my-model': {error}"
        ) from error
    return name


def prepare_repository(target: HubTarget) -> None:
    """Make the repository and the branch, if they are not there.

    Raises:
        CheckpointError: the Hub refuses, or is out of reach.
    """
    from huggingface_hub import HfApi

    with _hub_errors(target):
        api = HfApi(library_name="hf_speed")
        api.create_repo(target.repo_id, private=target.private, exist_ok=True)
        if target.revision is not None:
            api.create_branch(target.repo_id, branch=target.revision, exist_ok=True)


def push(directory: Path, target: HubTarget, *, has_made_card: bool) -> str:
    """Commit a model's directory; the address of the commit.

    Args:
        directory: holds nothing but the model.
        target: the repository, which is there already.
        has_made_card: whether the README.md is ours; then one on the Hub is kept.

    Raises:
        CheckpointError: the Hub refuses, or is out of reach. Nothing is changed there then.
    """
    from huggingface_hub import HfApi

    with _hub_errors(target):
        api = HfApi(library_name="hf_speed")
        keeps_card = has_made_card and api.file_exists(
            target.repo_id, CARD_NAME, revision=target.revision
        )
        commit = api.upload_folder(
            repo_id=target.repo_id,
            folder_path=directory,
            revision=target.revision,
            commit_message=target.message,
            ignore_patterns=[CARD_NAME] if keeps_card else None,
            delete_patterns=_STALE,
        )
    return str(commit.commit_url)


@contextlib.contextmanager
def _hub_errors(target: HubTarget) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # The client raises a dozen kinds, some of them httpx's.
        raise CheckpointError(
            f"The Hub did not take {target.repo_id}: {error}. Log in with `hf auth login` or set "
            f"HF_TOKEN to a token that may write there; nothing was committed."
        ) from error


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    """A directory for what only passes by; TMPDIR says where."""
    with tempfile.TemporaryDirectory(prefix="hf_speed-export-", ignore_cleanup_errors=True) as room:
        yield room
