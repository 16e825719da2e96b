"""Push the folder of a student to the hub."""

import glob
from pathlib import Path

from huggingface_hub import HfApi

from distill.machine.faults import first_line
from distill.students.parts import files_of
from distill.terminal.progress import stage

CARD = ("README.md", "comparison.png")


def push(folder: Path, repo: str) -> str:
    """Upload the student in `folder` to the repository `repo`, owner/name; returns its address.

    Only the files of the student and its card are sent: others in the folder may be private. A
    repository that does not exist is created as private. Raises ValueError without a login, and for
    what the hub refuses.
    """
    api = HfApi()
    files = [*files_of(folder), *(folder / name for name in CARD)]
    names = [file.relative_to(folder).as_posix() for file in files]
    try:
        with stage(f"pushing to {repo}"):
            api.create_repo(repo, private=True, exist_ok=True)
            api.upload_folder(
                folder_path=folder,
                repo_id=repo,
                commit_message="Add a student",
                allow_patterns=[glob.escape(name) for name in names],
            )
    except Exception as error:  # a missing login, right or network raises nearly anything
        what = f"cannot be pushed to ({first_line(error, 120)})"
        # Only a run's own folder may hold more than the student, and it is taken as it is again.
        more = {file for file in folder.rglob("*") if not file.is_dir()} - set(files)
        again = "give the command again" if more else f"`hf upload {repo} {folder} --private`"
        raise ValueError(f"repo={repo}: {what}; log in by `hf auth login`, then {again}") from None
    return f"{api.endpoint}/{repo}"
