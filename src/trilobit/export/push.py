"""Upload an exported directory to the hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from trilobit.errors import OutputError


def push(directory: Path, name: str) -> str:
    """Create the repository `name` if there is none, upload the directory, and give its address. Raises OutputError; what is on
    disk stays."""
    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=directory))
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise OutputError(
            f"{directory} was written, and could not be uploaded to {name}: {error}. Try `hf auth login`."
        ) from error
