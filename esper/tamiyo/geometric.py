"""torch-geometric, imported in one place: importing it under torch 2.13 and later warns of what it does inside."""

import warnings

with warnings.catch_warnings():
    # it compiles helpers with torch.jit.script when it is imported; its users can do nothing about that
    warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
    from torch_geometric.data import Batch, Data
    from torch_geometric.nn import GCNConv, TransformerConv
    from torch_geometric.nn.conv.gcn_conv import gcn_norm
    from torch_geometric.utils import scatter, softmax

__all__ = ["Batch", "Data", "GCNConv", "TransformerConv", "gcn_norm", "scatter", "softmax"]
