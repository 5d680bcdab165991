"""Upload an exported directory to the hub."""

import glob
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from trilobit.errors import OutputError

MODELS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.gguf", "trilobit.json")


def push(directory: Path, name: str) -> str:
    """Create the repository `name` if there is none, upload the directory, and give its address. Weights of an earlier upload
    that this one has not are deleted with it (a reader would take an old model.safetensors and not look at a new index); what
    lies in folders stays. Raises OutputError; what is on disk stays."""
    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        there = [file for file in api.list_repo_files(name) if "/" not in file]
        old = [glob.escape(file) for file in there if any(fnmatch(file, model) for model in MODELS)]
        return str(api.upload_folder(repo_id=name, folder_path=directory, delete_patterns=old))
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise OutputError(
            f"{directory} was written, and could not be uploaded to {name}: {error}. Try `hf auth login`."
        ) from error
