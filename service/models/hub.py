"""Downloading a model by its hub name: the files a server needs and no others."""

from __future__ import annotations

from pathlib import Path

from gptjet.service.engine.errors import BackendLoadError

# Named, not "*.safetensors": a repository often carries the same weights again in other formats.
_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
_PICKLE_FILES = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json")


def download_snapshot(name: str, *, allow_pickle: bool, local_files_only: bool) -> Path:
    """Folder of the hub's cache that holds model `name`, downloaded where it has to be.

    huggingface_hub draws a progress bar on a terminal and resumes a broken download. Pickles are
    fetched only where they are allowed and the repository has no safetensors. Raises
    BackendLoadError in one line.
    """
    import huggingface_hub
    from huggingface_hub import errors

    patterns = list(_FILES)
    try:
        if allow_pickle and (local_files_only or not _has_safetensors(name)):
            patterns += _PICKLE_FILES
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=patterns, local_files_only=local_files_only
            )
        )
    except errors.GatedRepoError as error:
        raise BackendLoadError(
            f"{name} is gated on the hub: accept its terms there and log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise BackendLoadError(
            f"{name} is not a folder here, and the hub has no such model (or it is private)"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if local_files_only:
            raise BackendLoadError(
                f"{name} is not a folder here, and the hub's cache on this machine does not hold it"
            ) from error
        raise _unreachable(name, error) from error
    except errors.HFValidationError as error:
        raise BackendLoadError(f"there is no folder {name}, and it is no hub name") from error
    except Exception as error:
        # Broad: the HTTP library below, and so its errors, changes with huggingface_hub's version.
        raise _unreachable(name, error) from error


def _has_safetensors(name: str) -> bool:
    import huggingface_hub

    return any(
        file in {"model.safetensors", "model.safetensors.index.json"}
        for file in huggingface_hub.list_repo_files(name)
    )


def _unreachable(name: str, error: Exception) -> BackendLoadError:
    # The first sentence says what happened; the rest is advice for callers of the library.
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return BackendLoadError(
        f"{name} is not a folder here, and the hub could not be reached: {reason}"
    )
