"""Tasks without an end whose concept drifts: what is right at one step is not at a later one.

Their mini-batches are new at every step, so that the loss that the inner loop records, of the next batch before
anything is learned from it, is the prequential one (Dawid 1984). There is no whole split to be judged on.
"""
