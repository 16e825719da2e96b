"""Corrections of a traced network before torch.onnx writes it.

torch.onnx and its optimiser give some operations another meaning than torch does. Each correction
here puts an operation that all three understand alike in the place of such a one.
"""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

TINY = 1e-7  # ours: torch.onnx's optimiser takes a sum with less than 1e-8 for one with 0
ATEN = torch.ops.aten


def corrected(traced: ExportedProgram) -> ExportedProgram:
    """The traced network itself, with its graph corrected in place."""
    graph = traced.graph_module.graph
    for node in list(graph.nodes):
        if node.target is ATEN.squeeze.dim:
            _keep_what_is_not_one(graph, node)
        elif node.target is ATEN.add.Tensor and _is_tiny(node.args[1]):
            _keep_tiny(graph, node)
    graph.lint()
    traced.graph_module.recompile()
    return traced


def _keep_what_is_not_one(graph: Graph, node: Node) -> None:
    """Remove a squeeze of a dimension that is not 1: torch returns its input, ONNX refuses it."""
    given = node.args[0]
    assert isinstance(given, Node)
    if given.meta["val"].shape[node.args[1]] != 1:
        node.replace_all_uses_with(given)
        graph.erase_node(node)


def _is_tiny(value: object) -> bool:
    return isinstance(value, float) and 0 < abs(value) < TINY


def _keep_tiny(graph: Graph, node: Node) -> None:
    """Add a tensor of one element in place of a tiny number: the optimiser drops only numbers."""
    with graph.inserting_before(node):
        tiny = graph.call_function(ATEN.full.default, ([1], node.args[1]), {"dtype": torch.float32})
    tiny.meta["val"] = torch.full((1,), 0.0, device="meta")
    node.update_arg(1, tiny)
