"""One file per command of `lopt`: its options, its examples, and what no other command needs."""
