"""What `make gpu` proves: `numerics` (right results), `behaviour` (how they come about), `tools` (other programs)."""
