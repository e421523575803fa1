"""Pushing a saved folder to the Hub: checked beforehand, in one commit, with a person's words in the README kept."""

from __future__ import annotations

import fnmatch
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from nc_hf.card_block import merge_cards
from nc_hf.doors import check_doors
from nc_hf.model_card import renewed_card
from nc_hf.models.saved_folder import HUB_FILES, stale_files

logger = logging.getLogger(__name__)

# No file that needs pickle, no checkpoint and nothing unforeseen is ever uploaded.
UPLOADED = (
    *(*HUB_FILES, "results.json", "twin.json", "[!.]*.md"),
    *("figures/*.png", "figures/*.svg", "seeds/*.json"),
    ".eval_results/*.yaml",  # where the Hub looks for results
)
# What a release draws and writes from results: of an earlier model once the folder has none of that name.
OF_RESULTS = (
    *("twin.json", "seeds/*.json", ".eval_results/*.yaml"),
    *(f"figures/{name}.{kind}" for name in ("classes", "angles", "norms", "collapse") for kind in ("png", "svg")),
)
TEMPORARY = (408, 429, 500, 502, 503, 504)
WAITS = (1, 4, 16)  # seconds before the second, third and last try
MOVED_ON = 412  # the branch has another head than the one that was read


class PushError(RuntimeError):
    """A push that did not happen; the local folder is complete, and the message says how to push it later."""


def check_access(repo_id: str, *, repo_type: str = "model", token: str | None = None) -> str:
    """Make sure, before hours of training, that a push can succeed.

    Args:
        repo_id: `"user/name"`, or a name in the user's own namespace; it need not exist yet.
        repo_type: `"model"` or `"dataset"`.
        token: the one of `hf auth login` when None.

    Returns:
        `"user/name"`.

    Raises:
        PushError: for a name that the Hub does not allow, no token or one that the Hub does not know or that may
            only read, a namespace or a repository of somebody else, or a Hub that cannot be reached.
    """
    api = HfApi(token=token and token.strip())
    try:
        validate_repo_id(repo_id)
        user = retried(api.whoami)
        repo_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise ValueError("the token may only read. Make one that may write, and `hf auth login` with it.")
        owners = [user["name"], *(org["name"] for org in user.get("orgs", []))]
        if repo_id.split("/")[0] not in owners:
            raise ValueError(f"the token is for {', '.join(owners)}. Choose one of these in place of {repo_id!r}.")
        if retried(lambda: api.repo_exists(repo_id, repo_type=repo_type)):
            retried(lambda: api.auth_check(repo_id, repo_type=repo_type, write=True))
        return repo_id
    except LocalTokenNotFoundError:
        raise PushError(f"cannot push to {repo_id}: there is no token. Run `hf auth login` first.") from None
    except (ValueError, OSError, httpx2.HTTPError) as error:
        raise PushError(f"cannot push to {repo_id}: {reason_of(error, token)}") from error


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str = "Upload model",
    check: bool = True,
) -> str:
    """Push a saved folder in one commit; the repository and the branch are made if need be.

    A README on the Hub keeps what a person wrote: only our marked block and our metadata change. Files of the
    repository that the folder does not have stay, but for weights and image settings of an earlier model. Temporary
    faults (429, 5xx, time-outs) are retried three times.

    Args:
        folder: as `save_pretrained` or `build_release` writes it.
        repo_id: `"user/name"`, or a name in the user's own namespace.
        private: visibility of a new repository; the account's default when None.
        revision: the branch; main when None.
        create_pr: open a pull request instead of committing to the branch.
        token: the one of `hf auth login` when None.
        commit_message: title of the commit.
        check: open the folder through every door first.

    Returns:
        The URL of the repository, or of the pull request.

    Raises:
        PushError: when it does not succeed; nothing local is changed by that, and a later push completes it.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise PushError(f"{folder} has no config.json: it is not a saved classifier.")
    place = {"private": private, "revision": revision, "create_pr": create_pr}
    if "/" not in repo_id:
        repo_id = check_access(repo_id, token=token)
    if check:
        check_folder(folder, repo_id, **place)
    try:
        card = renewed_card(folder, repo_id)
    except (ValueError, OSError) as error:
        raise _refused(folder, repo_id, error, place) from error
    try:
        api = HfApi(token=token and token.strip())
        url = retried(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        if revision is not None and not revision.startswith("refs/pr/"):  # a pull request is there already
            retried(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        settings = {"revision": revision, "create_pr": create_pr, "commit_message": commit_message}
        commit = on_the_head(lambda: _commit(api, folder, card, repo_id, **settings))
    except Exception as error:
        # Whatever a client or a file system raises here, the folder stays and the user is told how to go on.
        raise PushError(
            f"the push to {repo_id} failed: {reason_of(error, token)}\n"
            f"The folder {folder} is complete. Push it later with\n    {push_command(folder, repo_id, **place)}"
        ) from error
    logger.info("pushed %s to %s", folder, commit.pr_url or url)
    return commit.pr_url or str(url)


def check_folder(folder: str | Path, repo_id: str, **place: Any) -> None:
    """Open a folder through every door before it is pushed.

    Args:
        folder: as for `push_folder`.
        repo_id: `"user/name"`.
        **place: `private`, `revision` and `create_pr` of the push.

    Raises:
        PushError: naming the door that does not open, and the command that pushes the mended folder.
    """
    try:
        check_doors(folder)
    except (RuntimeError, ValueError, OSError) as error:
        raise _refused(Path(folder), repo_id, error, place) from error


def _refused(folder: Path, repo_id: str, error: Exception, place: dict[str, Any]) -> PushError:
    command = push_command(folder, repo_id, **place)
    return PushError(f"{folder} is not pushed to {repo_id}: {error}\nOnce that is mended, push it with\n    {command}")


def push_command(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """The command line that pushes a folder."""
    options = {"private": private, "revision": revision, "create_pr": create_pr or None}
    given = "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)
    return f"""python -c "import nc_hf; nc_hf.push_folder({str(folder)!r}, {repo_id!r}{given})\""""


def on_the_head(commit: Callable[[], Any]) -> Any:
    """What a commit on the head that it reads gives; tried once more when somebody else was faster."""
    try:
        return commit()
    except HfHubHTTPError as error:
        if error.response.status_code != MOVED_ON:
            raise
        logger.info("the repository has a new commit; reading it and trying once more")
        return commit()


def _commit(
    api: HfApi, folder: Path, card: str, repo_id: str, *, revision: str | None, create_pr: bool, commit_message: str
) -> Any:
    info = retried(lambda: api.repo_info(repo_id, revision=revision))
    head = info.sha
    readme = _merged_readme(api, card, repo_id, head) if card else None
    there = [file.rfilename for file in info.siblings or []]
    stale = stale_files(there, folder)
    if (folder / "results.json").is_file():
        stale += [name for name in _of_results(there) if not (folder / name).exists()]
    gone = [CommitOperationDelete(name) for name in stale]
    return retried(
        lambda: api.create_commit(
            repo_id,
            [*_operations(folder, readme), *gone],  # made anew for each try, since the client uses them up
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=head,
        )
    )


def _of_results(names: list[str]) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in OF_RESULTS)]


def _operations(folder: Path, readme: str | None) -> Iterator[CommitOperationAdd]:
    for path in sorted({path for pattern in UPLOADED for path in folder.glob(pattern) if path.is_file()}):
        name = path.relative_to(folder).as_posix()
        if name != "README.md":
            yield CommitOperationAdd(name, path)
    if readme is not None:
        yield CommitOperationAdd("README.md", readme.encode())


def _merged_readme(api: HfApi, card: str, repo_id: str, head: str) -> str | None:
    """The README to commit; None leaves the one on the Hub as it is.

    Raises:
        OSError: when it cannot be read now, which is no sign that there is none.
    """
    try:
        path = retried(lambda: api.hf_hub_download(repo_id, "README.md", revision=head))
        return merge_cards(card, Path(path).read_text(encoding="utf-8"))
    except RemoteEntryNotFoundError:
        return card
    except LocalEntryNotFoundError as error:
        raise OSError(f"the README there cannot be read: {reason_of(error.__cause__ or error)}") from error
    except ValueError as error:
        logger.warning("The README of %s is left as it is: %s", repo_id, error)
        return None


def retried(call: Callable[[], Any]) -> Any:
    """What a call to the Hub gives; temporary faults (429, 5xx, time-outs) are waited out three times."""
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            if not _is_temporary(error):
                raise
            logger.warning("The Hub does not answer well (%s); trying again in %d s.", reason_of(error), wait)
            time.sleep(wait)
    return call()


def _is_temporary(error: BaseException | None) -> bool:
    """Whether the error, or what it comes from, is a fault of the moment."""
    while error is not None:
        if isinstance(error, OfflineModeIsEnabled | httpx2.LocalProtocolError):
            return False
        if isinstance(error, HfHubHTTPError) and getattr(error, "response", None) is not None:
            return error.response.status_code in TEMPORARY
        # ConnectionError is also what the Xet client raises for any failed transfer.
        if isinstance(error, ConnectionError | TimeoutError | httpx2.TransportError):
            return True
        error = error.__cause__
    return False


def reason_of(error: BaseException, given: str | None = None) -> str:
    """What went wrong, without the token that is stored and the one that was given."""
    text = str(error).strip() or type(error).__name__
    for token in (given, get_token()):
        if token and token.strip():  # messages escape a line break at its end
            text = text.replace(token.strip(), "<token>")
    return text
