"""Pushing a student's folder to the hub."""

from pathlib import Path

from huggingface_hub import HfApi

from distill.machine.faults import first_line
from distill.terminal.progress import stage


def push(folder: Path, repo: str) -> str:
    """The address of `folder` on the hub, once all of it is there, in `repo`, owner/name.

    A repository that is not there is made, private: its owner opens it. Raises ValueError in words
    for what the hub does not take, and for no login.
    """
    api = HfApi()
    try:
        with stage(f"pushing to {repo}"):
            api.create_repo(repo, private=True, exist_ok=True)
            api.upload_folder(folder_path=folder, repo_id=repo, commit_message="Add a student")
    except Exception as error:  # no login, no right, no network: nearly anything
        what = f"cannot be pushed to ({first_line(error, 120)})"
        advice = f"log in by `hf auth login`, then `hf upload {repo} {folder}`"
        raise ValueError(f"repo={repo}: {what}; {advice}") from None
    return f"{api.endpoint}/{repo}"
