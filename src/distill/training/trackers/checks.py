"""Whether a tracker can be used: its package, login and network. Nothing is written or begun.

A run calls this before its models are read and its folder is made. Every question to a server ends
within `SECONDS`. Nothing here imports the packages.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import netrc
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import unquote, urlsplit

SECONDS = 15.0  # ours: for an answer of a server
WANDB, HUB = "https://api.wandb.ai", "https://huggingface.co"
REFUSING = (401, 403)
VIEWER = json.dumps({"query": "query Viewer { viewer { id } }"}).encode()
EXTRAS = {"wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}  # package -> extra


def check(loggers: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the key, for the first of these nodes that cannot log.

    `loggers` are the nodes of `logger` by key, as plain mappings.
    """
    for name, node in loggers.items():
        kind = str((node or {}).get("_target_")).rpartition(".")[2]
        if kind in CHECKS:
            CHECKS[kind](f"logger.{name}", node)


def need(package: str, key: str) -> None:
    """Raise ValueError if a package is not installed."""
    if importlib.util.find_spec(package) is None:
        what = f"the package {package} is not installed; pip install 'distill[{EXTRAS[package]}]'"
        raise ValueError(f"{key}: {what}, or leave it out by ~{key}")


def _wandb(key: str, node: Mapping[str, Any]) -> None:
    need("wandb", key)
    mode = str(node.get("mode") or os.environ.get("WANDB_MODE") or "online")
    if node.get("offline") or mode != "online":
        return
    place = (os.environ.get("WANDB_BASE_URL") or WANDB).rstrip("/")
    way = f"{key}.offline=true logs into the run folder, for `wandb sync` later"
    password = os.environ.get("WANDB_API_KEY") or _password(place)
    if not password and not os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        raise ValueError(f"{key}: there is no login for {place}; run `wandb login`, or {way}")
    headers = {"Content-Type": "application/json"}
    if password:
        user = base64.b64encode(f"api:{password}".encode()).decode()
        headers["Authorization"] = f"Basic {user}"
    _ask(f"{place}/graphql", key, way, headers=headers, data=VIEWER)


def _mlflow(key: str, node: Mapping[str, Any]) -> None:
    need("mlflow", key)
    place = str(node.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI") or "")
    if place.startswith(("http://", "https://")):
        way = f"{key}.tracking_uri=sqlite:///mlflow.db logs into a file"
        headers = {}
        if user := os.environ.get("MLFLOW_TRACKING_USERNAME"):
            both = f"{user}:{os.environ.get('MLFLOW_TRACKING_PASSWORD', '')}".encode()
            headers["Authorization"] = f"Basic {base64.b64encode(both).decode()}"
        elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
            headers["Authorization"] = f"Bearer {token}"
        _ask(f"{place.rstrip('/')}/health", key, way, headers=headers)


def _trackio(key: str, node: Mapping[str, Any]) -> None:
    need("trackio", key)
    if not (node.get("space_id") or os.environ.get("TRACKIO_SPACE_ID")):
        return
    from huggingface_hub import get_token

    way = f"{key}.space_id=null logs into Trackio's local data base"
    if not (token := get_token()):
        what = "there is no login at Hugging Face; run `hf auth login`, or"
        raise ValueError(f"{key}: {what} {way}")
    place = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    _ask(f"{place}/api/whoami-v2", key, way, headers={"Authorization": f"Bearer {token}"})


CHECKS: dict[str, Callable[[str, Mapping[str, Any]], None]] = {
    "Wandb": _wandb,
    "WandbLogger": _wandb,
    "Mlflow": _mlflow,
    "MLFlowLogger": _mlflow,
    "Trackio": _trackio,
}


def _password(place: str) -> str | None:
    """The password for the host of a URL in the file of logins; None if there is none."""
    for name in (os.environ.get("NETRC") or "~/.netrc", "~/_netrc"):
        with suppress(OSError, netrc.NetrcParseError):
            found = netrc.netrc(os.path.expanduser(name)).authenticators(
                urlsplit(place).hostname or ""
            )
            if found:
                return found[2]
    return None


def _ask(
    url: str, key: str, way: str, *, headers: Mapping[str, str], data: bytes | None = None
) -> None:
    """Raise ValueError if the server does not answer, or refuses the login. Any other answer is
    good. `way` is how to log without it.
    """
    found: list[Any] = []
    user, at, host = urlsplit(url).netloc.rpartition("@")
    if at:  # urllib takes no user in an address
        url = url.replace(f"{user}@", "", 1)
        headers = {"Authorization": f"Basic {base64.b64encode(unquote(user).encode()).decode()}"}
    asked = threading.Thread(target=_request, args=(url, headers, data, found), daemon=True)
    asked.start()
    asked.join(SECONDS)  # names of hosts are looked up without a limit
    host = f"{urlsplit(url).scheme}://{host}"
    if not found:
        raise ValueError(f"{key}: {host} did not answer within {SECONDS:.0f} s; {way}")
    answer = found[0]
    if isinstance(answer, int) and answer not in REFUSING:
        return
    if isinstance(answer, int):
        raise ValueError(f"{key}: {host} refuses the login ({answer}); log in anew, or {way}")
    raise ValueError(f"{key}: {host} cannot be reached ({answer}); {way}")


def _request(url: str, headers: Mapping[str, str], data: bytes | None, found: list[Any]) -> None:
    """Append the status of the answer, or the reason why there is none; nothing after SECONDS."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, data, dict(headers)), timeout=SECONDS
        ) as answer:
            found.append(answer.status)
    except urllib.error.HTTPError as error:
        found.append(error.code)
    except Exception as error:  # of the network, or of a malformed address
        reason = getattr(error, "reason", error)
        if not isinstance(reason, TimeoutError):  # which is no answer
            found.append(str(reason).strip() or type(reason).__name__)
