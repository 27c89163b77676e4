"""Control: policies for bodies of unknown masses, learned from rollouts in simulators of torch's operations."""
