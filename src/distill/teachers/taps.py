"""Outputs of chosen inner modules during one forward pass; the pass ends as soon as the last of them has run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn


class _LastTapReached(Exception):
    """Thrown through the network's forward, which needs nothing past the last tap."""


def tap(
    forward: Callable[[], object], modules: Mapping[str, nn.Module], pick: Callable[[object], Tensor]
) -> list[Tensor]:
    """Run `forward()` and return `pick(output)` of every module, in the order of `modules`.

    Hooks live for this call alone and are kept apart from those of any other, so nested and concurrent uses are safe.
    """
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, object, object], None]:
        def keep(_module: nn.Module, _inputs: object, output: object) -> None:
            seen[name] = pick(output)
            if len(seen) == len(modules):
                raise _LastTapReached

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        forward()
    except _LastTapReached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in modules if name not in seen]
    if missing:
        raise RuntimeError(f"taps {missing} never ran during the forward pass")
    return [seen[name] for name in modules]
