"""What the Hugging Face hub answers, as one message each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ade_harness.errors import HarnessError
from ade_harness.files.logs import SILENT, log_level


@contextmanager
def hub_explained(where: str, advice: str) -> Iterator[None]:
    """Turn the hub's many exceptions into one message; its own words about retries are silenced.

    Args:
        where: the repository, or the file in it, for the message.
        advice: what to do without the hub.

    Raises:
        HarnessError: says what is wrong with the repository, the revision, the key or the network.
        huggingface_hub.errors.EntryNotFoundError: the repository has no file of that name: another may do.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        with log_level("huggingface_hub", SILENT):  # its retries; the outcome is reported below
            yield
    except HarnessError:
        raise
    except GatedRepoError as error:
        raise HarnessError(
            f"{where}: this repository is gated. Accept its licence on its page, then log in: `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise HarnessError(f"{where}: this revision is no longer on the hub. {advice}") from error
    except LocalEntryNotFoundError as error:
        raise HarnessError(f"{where}: not in the cache, and the hub cannot be reached. {advice}") from error
    except RepositoryNotFoundError as error:
        raise HarnessError(f"{where}: not found on the hub. {advice}") from error
    except EntryNotFoundError:
        raise
    except Exception as error:  # HfHubHTTPError, OSError, and those of its HTTP library, whose name changes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise HarnessError(f"{where}: the download failed ({reason}). {advice}") from error
