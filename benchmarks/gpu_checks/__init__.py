"""What `make gpu` proves: `numerics` and `narrow` (right results), `behaviour` (how they come about), `tools`."""
