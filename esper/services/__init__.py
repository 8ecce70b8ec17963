"""Services under the names of the design documents."""
