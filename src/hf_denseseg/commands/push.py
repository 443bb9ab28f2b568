"""`denseseg push`: upload a model folder with its card to the hub."""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

EPILOG = """examples:
  denseseg push runs/demo/model your-name/dsct-demo --private
  denseseg push runs/demo/model your-name/dsct-demo --space --endpoint

Log in once with `hf auth login`. The folder needs config.json, preprocessor_config.json, the weights and README.md
(the card).

Models of this package get their code, so that `from_pretrained(..., trust_remote_code=True)` loads them where it is
not installed."""

NEEDED = ("config.json", "README.md", "preprocessor_config.json")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `push` to the command line."""
    parser = subparsers.add_parser(
        "push",
        help="upload a model folder to the Hugging Face Hub",
        description="Upload a model folder with its card to the Hugging Face Hub.",
        epilog=EPILOG,
    )
    parser.add_argument("folder", type=Path, help="folder of a trained or converted model")
    parser.add_argument("repository", help="OWNER/NAME on the hub; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument(
        "--space", action="store_true", help="also make a Space of this name with a page for the model"
    )
    parser.add_argument("--endpoint", action="store_true", help="also add handler.py, which inference endpoints call")
    parser.add_argument(
        "--message", metavar="TEXT", default="Upload model", help="commit message (default: %(default)s)"
    )


def main(args: argparse.Namespace) -> int:
    """Check the folder, then upload it, and the page."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.utils import LocalTokenNotFoundError

    from hf_denseseg.errors import InputError, RunError
    from hf_denseseg.files import write_atomic
    from hf_denseseg.inference.serving.hub import endpoint_files
    from hf_denseseg.models.auto.pretrained import read_config
    from hf_denseseg.models.auto.registration import is_own
    from hf_denseseg.models.auto.remote_code import write_code

    missing = [name for name in NEEDED if not (args.folder / name).exists()]
    if missing:
        raise InputError(f"{args.folder} lacks {', '.join(missing)}. Give the `model` folder of a finished run.")
    if is_own(read_config(str(args.folder))):
        write_code(args.folder)
    for name, text in endpoint_files().items() if args.endpoint else ():
        write_atomic(args.folder / name, text)
    pushed = 0
    try:
        for found in _upload(args):
            print(f"Pushed: {found}")
            pushed += 1
    except HFValidationError as error:
        raise InputError(f"{args.repository!r} is not a repository name: write OWNER/NAME.") from error
    except LocalTokenNotFoundError as error:
        raise InputError("Not logged in to the hub: run `hf auth login` first.") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        what = "The Space was not pushed, the model was; the same command again completes it" if pushed else (
            f"Nothing was pushed to {args.repository}"
        )  # fmt: skip
        raise RunError(f"{what}: {reason}") from error
    return 0


def _upload(args: argparse.Namespace) -> Iterator[str]:
    """Upload the model, then the Space; yields the address of each commit."""
    from huggingface_hub import HfApi, ModelCard

    from hf_denseseg.files import write_atomic
    from hf_denseseg.inference.serving.hub import space_files

    api = HfApi()
    api.create_repo(args.repository, private=args.private, exist_ok=True)
    yield str(api.upload_folder(repo_id=args.repository, folder_path=args.folder, commit_message=args.message))
    if not args.space:
        return
    license = ModelCard.load(args.folder / "README.md", ignore_metadata_errors=True).data.license
    with tempfile.TemporaryDirectory() as folder:
        for name, text in space_files(args.repository, license).items():
            write_atomic(Path(folder) / name, text)
        options = {"repo_type": "space", "private": args.private, "exist_ok": True, "space_sdk": "gradio"}
        api.create_repo(args.repository, **options)
        yield str(api.upload_folder(repo_id=args.repository, folder_path=folder, repo_type="space"))
