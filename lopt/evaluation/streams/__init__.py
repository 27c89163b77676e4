"""Rules on streams: prequential losses, how fast they recover from a change, and optimizers tuned in hindsight."""
