"""Small training stacks as strangers write them, each with its adapter and two planted faults."""
