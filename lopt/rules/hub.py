"""Rules on the Hugging Face Hub, or on a server that speaks as it does: `hf://owner/name`, `hf://owner/name@revision`.

Of a repository `rule.safetensors` alone is fetched, which is read as any rule file: nothing is unpickled. The library
keeps it in its cache, from where it is taken without network, and finds servers and tokens (HF_ENDPOINT, HF_TOKEN,
HF_HUB_OFFLINE, HF_HOME).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lopt.core.foreign_text import make_line
from lopt.core.installation import advise

SCHEME = "hf://"
RULE_FILE, PAGE_FILE = "rule.safetensors", "README.md"

_ADDRESS = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


class Address(NamedTuple):
    """Where a rule is on the hub.

    Attributes:
        repository: "owner/name".
        revision: a commit, a tag or a branch; None for the newest state.
    """

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{SCHEME}{self.repository}" + (f"@{self.revision}" if self.revision else "")


def is_address(name: object) -> bool:
    """Whether a rule's name is meant to be one on the hub."""
    return isinstance(name, str) and name.startswith(SCHEME)


def parse_address(text: str) -> Address:
    """The parts of `hf://owner/name` or `hf://owner/name@revision`.

    Raises:
        ValueError: it is neither.
    """
    found = _ADDRESS.fullmatch(text)
    if found is None:
        raise ValueError(f"a rule on the hub is hf://OWNER/NAME or hf://OWNER/NAME@REVISION, got {text!r}")
    return Address(found["repository"], found["revision"])


def fetch_rule(text: str) -> Path:
    """The rule file of an address: downloaded, or out of the cache where it is the same or there is no network.

    The folder that it lies in is named after the commit.

    Args:
        text: such as "hf://owner/name@v1".
    Raises:
        ValueError: the address is none.
        ImportError: huggingface_hub is not installed.
        FileNotFoundError: no such repository that may be read, no such revision, or no rule in it.
        ConnectionError: the hub is out of reach or refuses, and there is no copy in the cache.
    """
    address = parse_address(text)
    hub = _import_library()
    with _telling_errors(address, hub):
        path = hub.hf_hub_download(address.repository, RULE_FILE, revision=address.revision, library_name="lopt")
    return Path(path)


def push_folder(folder: Path, repository: str, *, private: bool = False, message: str = "Upload the rule") -> Address:
    """Upload a folder with a rule file and its page, in one commit; the repository is made if there is none.

    Args:
        folder: as `lopt.evaluation.report.model_card.export_rule` writes it; only these two files of it are taken.
        repository: "owner/name".
        private: whether a new repository is.
        message: of the commit.
    Returns:
        The address of this very state, its revision the commit.
    Raises:
        ValueError: the name of the repository is none.
        ImportError: huggingface_hub is not installed.
        FileNotFoundError: the hub knows no such owner, or keeps it secret.
        ConnectionError: the hub is out of reach, or refuses, as without a token.
    """
    address = parse_address(SCHEME + repository.removeprefix(SCHEME))
    if address.revision is not None:
        raise ValueError(f"a rule is pushed to OWNER/NAME, without a revision, got {repository!r}")
    hub = _import_library()
    with _telling_errors(address, hub):
        client = hub.HfApi(library_name="lopt")
        client.create_repo(address.repository, private=private, exist_ok=True)
        commit = client.upload_folder(
            repo_id=address.repository,
            folder_path=folder,
            allow_patterns=[RULE_FILE, PAGE_FILE],
            commit_message=message,
        )
    return Address(address.repository, commit.oid)


def _import_library() -> Any:
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError(f"hf:// addresses are read by huggingface_hub: {advise('hub')}") from error
    return huggingface_hub


@contextmanager
def _telling_errors(address: Address, hub: Any) -> Iterator[None]:
    """What the library raises as one line that says what to do; it nests offline, HTTP and file errors."""
    errors = hub.errors
    try:
        yield
    except errors.LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if hub.constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise ConnectionError(
            f"{address}: {reason}, and no copy is in {hub.constants.HF_HUB_CACHE}. Load it once with a network, "
            "or give the path of a rule file."
        ) from error
    except (errors.GatedRepoError, errors.RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"{address}: there is no such repository, or it is not open to you: log in by `hf auth login` or HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{address}: the repository has no revision {address.revision!r}") from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"{address}: the repository has no {RULE_FILE}: it holds no rule of lopt") from error
    except errors.OfflineModeIsEnabled as error:
        raise ConnectionError(f"{address}: HF_HUB_OFFLINE is set: unset it to reach the hub") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        advice = ": log in by `hf auth login` or HF_TOKEN, with the right to write" if status in (401, 403) else ""
        raise ConnectionError(f"{address}: the hub answers {status}{advice} ({make_line(error)})") from error
    except (OSError, errors.HTTPError) as error:  # of the client's transport
        raise ConnectionError(f"{address}: the hub cannot be reached ({make_line(error)})") from error
