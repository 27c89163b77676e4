"""Code for the CPU in C++, compiled where it is first used; each file has a definition that it is compared with."""
