"""Steps by ordinary operations of torch: small tensors together, large ones in chunks.

Takes every parameter that a rule can step, on any device, traced or not; the other backend is a faster way for some.
"""
