"""Everything that touches ModelOpt."""
