"""One file per command of `lopt`: its options, its examples, and what no other command needs.

A command imports what is heavy (torch, rules, matplotlib) when it runs, so that `--help` answers at once. To add one,
write its file and name it in `lopt/cli/program.py`.
"""
