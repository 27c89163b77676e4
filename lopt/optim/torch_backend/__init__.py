"""Steps by ordinary operations of torch: small tensors together, large ones in chunks."""
