"""A decision point as a graph: layers as nodes, data flow as edges, and what could be done as candidates."""
