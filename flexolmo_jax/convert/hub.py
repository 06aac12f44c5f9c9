"""Models on Hugging Face's hub, by name: `hf://org/name`, `org/name`, either with `@revision`.

huggingface_hub downloads them into its cache, goes on with what it has, and finds its token and
endpoint as its own documentation says (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

import fnmatch
import glob
import re
from pathlib import Path

from flexolmo_jax.errors import UserError, printable
from flexolmo_jax.runtime.progress import note
from flexolmo_jax.storage.paths import children, listing, path_of, takes_paths

NAME = re.compile(r"(hf://)?(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?")
FILES = ("*.safetensors", "*.json", "*.jinja")  # never a pickle, nor a program


def local_copy(source: str) -> Path:
    """The directory `source`, or where the hub's model of this name has been downloaded to.

    A directory goes before a name. Raises UserError where the model cannot be had.
    """
    match = NAME.fullmatch(source)
    if not match and source.startswith("hf://"):
        raise UserError(
            f"got {source!r:.200}; expected hf://org/name, or hf://org/name@revision with a branch,"
            " tag or commit"
        )
    if not match or (not match[1] and path_of(source).exists()):
        return path_of(source)
    import huggingface_hub

    repository = match[2]
    note(f"downloading {repository} from the hub")
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=match[3], allow_patterns=list(FILES)
        )
    except Exception as error:  # the library's own, and those of its HTTP client
        no_folder = "" if match[1] else f"there is no directory {source}, and "
        raise UserError(
            f"{no_folder}the hub's model {repository} cannot be had: {_why(error)}; check the name,"
            " the network, and for a model with conditions HF_TOKEN"
        ) from None
    return Path(folder)


@takes_paths
def push(folder: Path, name: str, *, public: bool = False) -> str:
    """Uploads a checkpoint that `export-hf` wrote, with its card; returns its address.

    The hub's model is made where it is missing, private unless `public`. What the hub has already
    is not sent again. Raises UserError for a folder that is no checkpoint, and where the hub
    refuses.
    """
    match = NAME.fullmatch(name)
    if not match or match[3]:
        raise UserError(f"got {name!r:.200}; expected org/name")
    files = [path.name for path in children(folder)]
    wanted = ("config.json", "README.md", "*.safetensors")
    if missing := [pattern for pattern in wanted if not fnmatch.filter(files, pattern)]:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}; expected a checkpoint that `flexolmo export-hf`"
            " wrote"
        )
    import huggingface_hub

    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(match[2], private=not public, exist_ok=True)
        done = hub.upload_folder(
            repo_id=match[2],
            folder_path=folder,
            commit_message="Upload by flexolmo-jax",
            allow_patterns=[*map(glob.escape, listing(folder))],
        )
    except Exception as error:
        raise UserError(
            f"{match[2]} cannot be uploaded: {_why(error)}; check the network, the name, and that"
            " HF_TOKEN may write there"
        ) from None
    return str(done.repo_url)


def _why(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"{printable(line):.300}"
