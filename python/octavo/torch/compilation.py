"""What `torch.compile` can make of converted models beyond what it makes of every model."""

import operator
from collections import defaultdict
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node

import octavo


class ShareInputs(CustomGraphPass):
    """Makes one call of the products of one input: it is quantized once, as `octavo.linear_many` does.

    >>> torch.compile(model, options={"post_grad_custom_pre_pass": ShareInputs()})  # doctest: +SKIP

    These are queries, keys and values of attention, or gate and up of an MLP, as far as their layers have the same
    options. Outputs are those of the layers alone, bit for bit.
    """

    def __call__(self, graph: Graph) -> None:
        """Change a graph of the compiler's, whose operations write to none of their arguments."""
        products = defaultdict[Any, list[Node]](list)
        places = {node: place for place, node in enumerate(graph.nodes)}
        for node in graph.find_nodes(op="call_function", target=torch.ops.octavo.linear.default):
            known = products[node.args[0], node.args[-1]]
            computed = [own for own in node.all_input_nodes if own.op != "get_attr"]
            if all(places[own] < places[first] for own in computed for first in known[:1]):
                known.append(node)
        for nodes in (group for group in products.values() if len(group) > 1):
            for constant in (own for node in nodes for own in node.all_input_nodes if own.op == "get_attr"):
                nodes[0].prepend(constant)
            with graph.inserting_before(nodes[0]):
                arrays = [array for node in nodes for array in node.args[1:8]]
                given = nodes[0].args[0], arrays, nodes[0].args[-1]
                many = graph.call_function(torch.ops.octavo.linear_many.default, given)
                many.meta["val"] = [node.meta["val"] for node in nodes]
                results = [graph.call_function(operator.getitem, (many, index)) for index in range(len(nodes))]
            for node, result in zip(nodes, results, strict=True):
                result.meta.update(node.meta)
                node.replace_all_uses_with(result)
                graph.erase_node(node)

    def uuid(self) -> Any:
        """Of what it makes, for the compiler's cache."""
        return f"octavo {octavo.__version__} ShareInputs"
