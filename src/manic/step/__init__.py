"""What one step does on the local shards of a rank: plan, sums, captures of the update, writes."""
