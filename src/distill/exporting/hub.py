"""Push the folder of a student to the hub."""

from pathlib import Path

from huggingface_hub import HfApi

from distill.machine.faults import first_line
from distill.terminal.progress import stage


def push(folder: Path, repo: str) -> str:
    """Upload `folder` to the repository `repo`, owner/name; returns its address.

    A repository that does not exist is created as private. Raises ValueError without a login, and
    for what the hub refuses.
    """
    api = HfApi()
    try:
        with stage(f"pushing to {repo}"):
            api.create_repo(repo, private=True, exist_ok=True)
            api.upload_folder(folder_path=folder, repo_id=repo, commit_message="Add a student")
    except Exception as error:  # a missing login, right or network raises nearly anything
        what = f"cannot be pushed to ({first_line(error, 120)})"
        advice = f"log in by `hf auth login`, then `hf upload {repo} {folder}`"
        raise ValueError(f"repo={repo}: {what}; {advice}") from None
    return f"{api.endpoint}/{repo}"
