"""Which launches of `lopt_kernels` make a rule's step: one class per family of rules, named in `registry`."""
